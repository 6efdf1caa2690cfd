// What several views share: how wide they are, whether the ground is dark, copying, and small pieces.

import type { ComponentChildren, RefObject } from "preact";
import { useEffect, useLayoutEffect, useState } from "preact/hooks";

/** Width of an element, followed as it changes. */
export function useWidth(ref: RefObject<HTMLElement | null>, start = 640): number {
  const [width, setWidth] = useState(start);
  useLayoutEffect(() => {
    const element = ref.current;
    if (!element) return;
    const read = () => setWidth(Math.max(120, Math.floor(element.clientWidth)));
    read();
    const watch = new ResizeObserver(read);
    watch.observe(element);
    return () => watch.disconnect();
  }, []);
  return width;
}

/** Whether the ground that an element stands on is dark: chosen on the page, said by a notebook, or by the system. */
export function useDark(): boolean {
  const [dark, setDark] = useState(isDark());
  useEffect(() => {
    const read = () => setDark(isDark());
    const media = matchMedia("(prefers-color-scheme: dark)");
    media.addEventListener("change", read);
    const watch = new MutationObserver(read);
    for (const node of [document.documentElement, document.body])
      watch.observe(node, { attributes: true, attributeFilter: ["data-theme", "data-jp-theme-light", "class"] });
    return () => {
      media.removeEventListener("change", read);
      watch.disconnect();
    };
  }, []);
  return dark;
}

export function isDark(): boolean {
  const chosen = document.documentElement.dataset["theme"];
  if (chosen === "dark" || chosen === "light") return chosen === "dark";
  const notebook = document.body?.dataset["jpThemeLight"];
  if (notebook) return notebook === "false";
  if (document.body?.classList.contains("vscode-dark")) return true;
  if (document.body?.classList.contains("vscode-light")) return false;
  return matchMedia("(prefers-color-scheme: dark)").matches;
}

export function Copy({ text, label = "Copy" }: { text: () => string; label?: string }) {
  const [said, setSaid] = useState("");
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(text());
      setSaid("Copied");
    } catch {
      setSaid("Not allowed here");
    }
    setTimeout(() => setSaid(""), 1500);
  };
  return (
    <button type="button" class="quiet" onClick={copy} aria-live="polite">
      {said || label}
    </button>
  );
}

/** A sentence in which `what stands so` is code. */
export function Said({ text }: { text: string }) {
  return <>{text.split(/`([^`]+)`/).map((piece, i) => (i % 2 ? <code>{piece}</code> : piece))}</>;
}

export function Panel(props: { title?: string; aside?: ComponentChildren; children: ComponentChildren; class?: string; id?: string }) {
  return (
    <section class={`panel ${props.class ?? ""}`} id={props.id}>
      {(props.title || props.aside) && (
        <div class="panel-head">
          {props.title && <h2>{props.title}</h2>}
          {props.aside && <div class="panel-aside">{props.aside}</div>}
        </div>
      )}
      {props.children}
    </section>
  );
}

export function Empty({ title, children }: { title: string; children?: ComponentChildren }) {
  return (
    <div class="empty">
      <svg viewBox="0 0 96 40" aria-hidden="true">
        <circle cx="16" cy="20" r="9" />
        <circle cx="80" cy="20" r="9" />
        <circle cx="16" cy="20" r="3" class="hole" />
        <circle cx="80" cy="20" r="3" class="hole" />
        <path d="M16 20 C 34 44, 48 40, 54 30" />
      </svg>
      <p class="empty-title">{title}</p>
      {children}
    </div>
  );
}

export function Failed({ message, children }: { message: string; children?: ComponentChildren }) {
  return (
    <div class="failed" role="alert">
      <p>{message}</p>
      {children}
    </div>
  );
}
