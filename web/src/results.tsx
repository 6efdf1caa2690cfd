// The results of the folder: listed with what is damaged among them, and one of them whole.

import { useMemo, useState } from "preact/hooks";
import { address, slicesOf, useGet, type Doc, type Entry } from "./api";
import { methodName } from "./data";
import { Empty, Failed } from "./parts";
import { Show, titleOf } from "./result";

export function ResultsPage({ changed, folder }: { changed: number; folder: string }) {
  const { got, failed, busy } = useGet<Entry[]>("/api/results", changed);
  const [word, setWord] = useState("");
  const shown = useMemo(() => {
    const asked = word.toLowerCase().split(/\s+/).filter(Boolean);
    return (got ?? []).filter((one) => asked.every((piece) => `${one.name} ${one.method} ${one.model} ${one.about}`.toLowerCase().includes(piece)));
  }, [got, word]);
  return (
    <>
      <PageHead title="Results" lead={folder ? `Folders of ${folder}; the command line and the library read and write the same ones.` : ""} />
      {failed && <Failed message={failed} />}
      {got && got.length > 6 && (
        <label class="search"><span class="hidden">Search results</span>
          <input type="search" placeholder="Search by name, method, model or task" value={word} onInput={(event) => setWord(event.currentTarget.value)} />
        </label>
      )}
      {got && !got.length && (
        <Empty title="No results here yet">
          <p>Run a method on <a href="#/find">Find</a>, <a href="#/prove">Prove</a> or <a href="#/turn">Turn</a>, or save one from Python: <code>result.save("{folder || "FOLDER"}/name")</code></p>
        </Empty>
      )}
      {busy && !got && <div class="waiting" aria-busy="true">Reading the folder …</div>}
      <ul class="entries">
        {shown.map((one) => (
          <li class={one.kind}>
            <a href={`#/results/${address(one.name)}`}>
              <b>{one.name}</b>
              <span class="entry-method">{one.kind === "damaged" ? "Damaged" : one.method ? methodName(one.method) : "Made by hand"}{one.kind === "knob" ? ", a knob" : ""}</span>
              <span class="entry-about">{one.kind === "damaged" ? one.message : [one.model, one.about].filter(Boolean).join(" · ")}</span>
              <time>{one.date.replace("T", " ").slice(0, 16)}</time>
            </a>
          </li>
        ))}
      </ul>
      {got && got.length > 0 && !shown.length && <Empty title={`Nothing here matches “${word}”`} />}
    </>
  );
}

export function ResultPage({ name, changed }: { name: string; changed: number }) {
  const { got, failed, busy } = useGet<Doc>(`/api/result?name=${encodeURIComponent(name)}`, changed);
  const slices = useMemo(() => slicesOf(name), [name]);
  const figure = (format: string) => `/api/figure?name=${encodeURIComponent(name)}&format=${format}`;
  return (
    <>
      <PageHead title={got ? titleOf(got) : name} back={{ to: "#/results", text: "Results" }} lead={got ? leadOf(got) : ""}>
        {got && (
          <div class="exports">
            <span class="folder"><code>{name}</code></span>
            {got.kind === "result" && <><a href={figure("svg")} download={`${name}.svg`}>SVG</a><a href={figure("png")} download={`${name}.png`}>PNG</a><a href={figure("pdf")} download={`${name}.pdf`}>PDF</a></>}
            <a href={`/api/saved?name=${encodeURIComponent(name)}`} download={`${name}.html`}>One file</a>
          </div>
        )}
      </PageHead>
      {failed && (
        <Failed message={failed}>
          <p>The other results are not touched by it. <a href="#/results">To the results</a></p>
        </Failed>
      )}
      {busy && !got && <div class="waiting" aria-busy="true">Reading {name} …</div>}
      {got && <Show key={name} doc={got} slices={slices} link={(part) => (/^L\d+(\.|$)/.test(part) && !part.includes(">") ? `#/model/${part}` : undefined)} />}
    </>
  );
}

function leadOf(doc: Doc): string {
  if (doc.kind === "knob") return doc.origin;
  const model = doc.provenance.find(([name]) => name === "model source")?.[1];
  return [doc.asked, model, doc.measured > 1 ? `${doc.measured.toLocaleString("en")} values` : ""].filter(Boolean).join(" · ");
}

export function PageHead(props: { title: string; lead?: string; back?: { to: string; text: string }; children?: preact.ComponentChildren }) {
  return (
    <div class="page-head">
      {props.back && <a class="back" href={props.back.to}>← {props.back.text}</a>}
      <h1>{props.title}</h1>
      {props.lead && <p class="lead-line">{props.lead}</p>}
      {props.children}
    </div>
  );
}
