// The results of the folder: listed with what is damaged among them, and one of them whole.

import { useMemo, useState } from "preact/hooks";
import { address, slicesOf, useGet, type Doc, type Entry } from "./api";
import { methodName } from "./data";
import { Empty, Failed, Panel } from "./parts";
import { go } from "./app";
import { Figure, Show, titleOf } from "./result";

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
            {got.kind === "result" && <a href={`#/compare?${new URLSearchParams({ a: name })}`}>Compare</a>}
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

/** Two Results side by side, and one less the other where their axes are the same. */
export function ComparePage({ query, changed }: { query: URLSearchParams; changed: number }) {
  const { got, failed } = useGet<Entry[]>("/api/results", changed);
  const [a, b] = [query.get("a") ?? "", query.get("b") ?? ""];
  const both = a && b && a !== b;
  const less = useGet<Doc>(both ? `/api/difference?${new URLSearchParams({ a, b })}` : null);
  const results = (got ?? []).filter((one) => one.kind === "result");
  const choose = (name: "a" | "b", value: string) => {
    const next = new URLSearchParams({ a, b });
    next.set(name, value);
    go(`compare?${next}`);
  };
  const pick = (name: "a" | "b", value: string, label: string) => (
    <label class="pick"><span>{label}</span>
      <select value={value} onChange={(event) => choose(name, event.currentTarget.value)}>
        <option value="">choose a Result</option>
        {results.map((one) => <option value={one.name}>{one.name}{one.method ? ` (${methodName(one.method)})` : ""}</option>)}
      </select>
    </label>
  );
  return (
    <>
      <PageHead title="Compare" back={{ to: "#/results", text: "Results" }} lead="Two Results side by side, and the one less the other where they have the same axes." />
      {failed && <Failed message={failed} />}
      {got && results.length < 2 && <Empty title="Two Results are needed"><p>This folder has {results.length}. Run a method on <a href="#/find">Find</a> or <a href="#/prove">Prove</a>.</p></Empty>}
      <div class="choose">{pick("a", a, "Left")}{pick("b", b, "Right")}</div>
      {both && (
        <Panel title="Left less right">
          {less.failed ? <p class="note">{less.failed}</p> : less.got?.kind === "result" ? <div class="nested"><Figure doc={less.got} slices={undefined} link={undefined} /><ul class="notes">{less.got.notes.map((note) => <li>{note}</li>)}</ul></div> : <div class="waiting" aria-busy="true">Reading both …</div>}
        </Panel>
      )}
      {both && <div class="beside">{[a, b].map((name) => <Side key={name} name={name} changed={changed} />)}</div>}
    </>
  );
}

function Side({ name, changed }: { name: string; changed: number }) {
  const { got, failed } = useGet<Doc>(`/api/result?name=${encodeURIComponent(name)}`, changed);
  const slices = useMemo(() => slicesOf(name), [name]);
  if (failed) return <Failed message={failed} />;
  if (!got) return <div class="waiting" aria-busy="true">Reading {name} …</div>;
  return (
    <section>
      <h2 class="beside-name"><a href={`#/results/${address(name)}`}>{name}</a></h2>
      <p class="note">{titleOf(got)}; {leadOf(got)}</p>
      {got.kind === "result" ? <Figure doc={got} slices={slices} link={undefined} /> : <p class="note">A knob has no figure.</p>}
    </section>
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
