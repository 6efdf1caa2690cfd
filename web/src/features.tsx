// The features of a sparse dictionary: which are active on a text and where, what one reads and writes, and the contexts that excite it.

import { useEffect, useState } from "preact/hooks";
import { go } from "./app";
import { useLook, type State } from "./api";
import { number } from "./data";
import { Empty, Failed, Panel, Said } from "./parts";
import { PageHead } from "./results";
import { Table } from "./table";
import { Tokens } from "./tokens";
import type { Row } from "./data";

const EXAMPLE = "The capital of Lolavia is Grerum. Emma asked Kate about the violin. The capital of Lolavia is";

interface Dictionary {
  place: string;
  reads: string;
  writes: string;
  n: number;
  source: string;
  notes: string[];
}

interface Active {
  tokens: string[];
  rows: { feature: string; most: number; values: number[] }[];
  active: number[];
  n: number;
}

export function FeaturesPage({ part, query, state }: { part: string; query: URLSearchParams; state: State | null }) {
  const model = state?.model.state;
  const { got, failed } = useLook<{ dictionaries: Dictionary[] }>(model === "ready" ? { what: "dictionaries" } : null);
  const [text, setText] = useState(query.get("text") ?? EXAMPLE);
  const [asked, ask] = useState(text);
  const place = query.get("place") ?? part.replace(/\.F\d+$/, "");
  const head = <PageHead title="Features" lead="What a sparse dictionary finds in the model's signals, as parts that can be looked at, patched and turned." />;
  if (model === "none") return <>{head}<Empty title="No model is open"><p>Start <code>patchbay ui MODEL --dictionary FOLDER</code>.</p></Empty></>;
  if (model === "failed") return <>{head}<Failed message={state?.model.message ?? ""} /></>;
  if (failed) return <>{head}<Failed message={failed} /></>;
  if (!got) return <>{head}<div class="waiting" aria-busy="true">{model === "ready" ? "Reading the dictionaries …" : "The model is loading …"}</div></>;
  if (!got.dictionaries.length)
    return (
      <>
        {head}
        <Empty title="No dictionary is attached">
          <p>Start <code>patchbay ui {state?.model.source} --dictionary FOLDER</code> with one that SAELens, sparsify or Patchbay wrote; <a href="#/train/dictionary">Train</a> makes one.</p>
        </Empty>
      </>
    );
  const chosen = got.dictionaries.find((one) => one.place === place) ?? (got.dictionaries[0] as Dictionary);
  return (
    <>
      {head}
      <Panel title={`${chosen.n.toLocaleString("en")} features of ${chosen.writes} in layer ${chosen.place.replace(/^L(\d+).*/, "$1")}`} aside={got.dictionaries.length > 1 && (
        <label class="pick"><span>dictionary</span><select value={chosen.place} onChange={(event) => go(`features?place=${event.currentTarget.value}`)}>{got.dictionaries.map((one) => <option value={one.place}>{one.place} ({one.n})</option>)}</select></label>
      )}>
        <form class="feature-ask" onSubmit={(event) => { event.preventDefault(); ask(text); }}>
          <label class="hidden" for="feature-text">Texts, one to a line</label>
          <textarea id="feature-text" rows={3} value={text} onInput={(event) => setText(event.currentTarget.value)} placeholder="Texts, one to a line: the first is shown token by token, all of them are searched for contexts" />
          <div class="form-foot"><button type="submit" class="primary" disabled={!text.trim()}>Read</button><Jump place={chosen.place} n={chosen.n} /></div>
        </form>
        <p class="note"><Said text={[chosen.source, ...chosen.notes].filter(Boolean).join("; ")} /></p>
      </Panel>
      {asked.trim() && <OnText text={lines(asked)[0] as string} place={chosen.place} part={part} />}
      {part && <One part={part} texts={lines(asked)} />}
    </>
  );
}

function lines(text: string): string[] {
  return text.split("\n").filter((line) => line.trim()).slice(0, 64);
}

function Jump({ place, n }: { place: string; n: number }) {
  const [number_, setNumber] = useState("");
  const open = () => /^\d+$/.test(number_) && Number(number_) < n && go(`features/${place}.F${number_}`);
  return (
    <span class="jump">
      <label for="jump">Feature</label>
      <input id="jump" type="text" inputMode="numeric" value={number_} placeholder={`0 to ${n - 1}`} onInput={(event) => setNumber(event.currentTarget.value)} onKeyDown={(event) => { if (event.key === "Enter") { event.preventDefault(); open(); } }} />
      <button type="button" class="quiet" disabled={!/^\d+$/.test(number_) || Number(number_) >= n} onClick={open}>Open</button>
    </span>
  );
}

function OnText({ text, place, part }: { text: string; place: string; part: string }) {
  const { got, failed } = useLook<Active>({ what: "active", text, place, ...(part ? { part } : {}) });
  const [hovered, hover] = useState("");
  useEffect(() => hover(""), [part, text]);
  if (failed) return <Failed message={failed} />;
  if (!got) return <div class="waiting" aria-busy="true">Reading the text …</div>;
  const shown = got.rows.find((one) => one.feature === (hovered || part)) ?? got.rows[0];
  const mean = got.active.reduce((a, b) => a + b, 0) / Math.max(1, got.active.length);
  const most = got.rows[0]?.most ?? 1;
  return (
    <Panel title="On this text" aside={<span class="note num">{number(Math.round(mean * 10) / 10)} of {got.n} active at a token</span>}>
      {shown ? (
        <>
          <Tokens tokens={got.tokens} values={shown.values} unit="activation" label={`Activation of ${shown.feature}`} legend />
          <p class="note">{shown.feature}, highest {number(shown.most)}</p>
          <ol class="actives">
            {got.rows.map((row) => (
              <li>
                <a href={`#/features/${row.feature}`} aria-current={row.feature === part ? "true" : undefined} onPointerEnter={() => hover(row.feature)} onPointerLeave={() => hover("")} onFocus={() => hover(row.feature)} onBlur={() => hover("")}>
                  <code>{row.feature}</code><span class="next-bar"><i style={{ width: `${(100 * row.most) / most}%` }} /></span><span class="num">{number(row.most)}</span>
                </a>
              </li>
            ))}
          </ol>
        </>
      ) : <p class="note">No feature is active on it.</p>}
    </Panel>
  );
}

function One({ part, texts }: { part: string; texts: string[] }) {
  const { got, failed } = useLook<{ title: string; sections: { title: string; rows: Row[] }[] }>({ what: "feature", part, texts });
  const turn = new URLSearchParams({ given: JSON.stringify({ parts: part, strength: "0" }), name: part.replace(/\./g, "-").toLowerCase() });
  return (
    <Panel title={got?.title ?? part} id="part" aside={<a class="quiet" href={`#/turn/scale?${turn}`}>Make a knob of it</a>}>
      {failed && <Failed message={failed} />}
      {!got && !failed && <div class="waiting" aria-busy="true">Reading {part} …</div>}
      {got?.sections.map((section) => <Table title={section.title} rows={section.rows} open />)}
    </Panel>
  );
}
