// One Result by itself: the saved file, and a cell of a notebook.

import type { Doc } from "./data";
import { methodName } from "./data";
import { Show, titleOf } from "./result";

export function Saved({ doc, bare }: { doc: Doc; bare?: boolean }) {
  return (
    <div class={bare ? "alone bare" : "alone"}>
      <header class="alone-head">
        {bare ? <p class="alone-title">{titleOf(doc)}</p> : <h1>{titleOf(doc)}</h1>}
        <p class="lead-line">{doc.kind === "result" ? (doc.asked ? `${doc.asked} · ` : "") + doc.title.replace(/^[^:]*: /, "") : methodName(doc.method)}</p>
      </header>
      {bare ? <Show doc={doc} /> : <main><Show doc={doc} /></main>}
      {!bare && <footer class="foot">Made by patchbay. {doc.origin}</footer>}
    </div>
  );
}
