// The three shells of one bundle: the page of a server, the widget of a notebook, and a saved file. Each says which it is.

import { render } from "preact";
import "./style.css";
import { App } from "./app";
import type { Doc } from "./data";
import { isDark } from "./parts";
import { Saved } from "./saved";

interface WidgetModel {
  get(name: string): unknown;
  on(event: string, callback: () => void): void;
  off(event: string, callback: () => void): void;
}

/** What anywidget calls for each view of a cell. */
function renderWidget({ model, el }: { model: WidgetModel; el: HTMLElement }): () => void {
  const draw = () => render(<Saved doc={JSON.parse(String(model.get("document"))) as Doc} bare />, el);
  el.classList.add("pb", "pb-cell");
  el.dataset["dark"] = String(isDark());
  const watch = new MutationObserver(() => (el.dataset["dark"] = String(isDark())));
  watch.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "class"] });
  draw();
  model.on("change:document", draw);
  return () => {
    watch.disconnect();
    model.off("change:document", draw);
    render(null, el);
  };
}

const page = document.getElementById("patchbay-page");
if (page) {
  const held = document.getElementById("patchbay-data");
  render(held ? <Saved doc={JSON.parse(held.textContent ?? "null") as Doc} /> : <App />, page);
}

export default { render: renderWidget };
