// The papers: what is published, by day, week and month, what is liked now, and a search as one types; and one paper, beside what of it runs here.

import { useEffect, useRef, useState } from "preact/hooks";
import { go } from "./app";
import { post, useGet, type Paper, type Papers, type State, type WholePaper } from "./api";
import { Curve } from "./curve";
import { number } from "./data";
import { Copy, Empty, Failed, Panel } from "./parts";
import { PageHead } from "./results";
import { RunCard } from "./runs";

const TABS: [string, string][] = [["trending", "Trending"], ["day", "Day"], ["week", "Week"], ["month", "Month"], ["all", "All"]];
const STATES: [string, string][] = [["", "any state"], ["runs here", "all that runs"], ["works", "runs here"], ["partly", "runs in part"], ["unmeasured", "runs, not measured"], ["not yet", "not yet"], ["not a system", "nothing to run"]];
const SAID: Record<string, string> = { works: "runs here", partly: "runs in part", unmeasured: "runs, not measured", "not yet": "not yet", "not a system": "nothing to run", "": "not in the catalogue" };

function useLate<T>(value: T, after: number): T {
  const [late, setLate] = useState(value);
  useEffect(() => {
    const timer = window.setTimeout(() => setLate(value), after);
    return () => clearTimeout(timer);
  }, [value]);
  return late;
}

export function PapersPage({ query }: { query: URLSearchParams }) {
  const [words, setWords] = useState(query.get("words") ?? "");
  const [rows, setRows] = useState(60);
  const asked = useLate(words, 90);
  const held = useRef<Papers | null>(null);
  const change = (name: string, value: string) => {
    const next = new URLSearchParams(query);
    value ? next.set(name, value) : next.delete(name);
    if (name === "view") next.delete("day");
    go(`papers${next.size ? `?${next}` : ""}`);
  };
  useEffect(() => {
    if (asked !== (query.get("words") ?? "")) {
      const next = new URLSearchParams(query);
      asked ? next.set("words", asked) : next.delete("words");
      history.replaceState(null, "", `#/papers${next.size ? `?${next}` : ""}`);
    }
  }, [asked]);
  const sent = new URLSearchParams([...query].filter(([name]) => name !== "words"));
  if (asked.trim()) sent.set("words", asked);
  if (rows > 60) sent.set("rows", String(rows));
  const { got, failed } = useGet<Papers>(`/api/papers?${sent}`);
  if (got) held.current = got;
  const shown = got ?? held.current;
  const view = query.get("view") ?? shown?.view ?? "";
  const moving = ["day", "week", "month"].includes(view) && !asked.trim();
  return (
    <>
      <PageHead title="Papers" lead={shown ? `${shown.of.toLocaleString("en")} papers, each beside what of it runs here.` : ""} />
      <div class="papers-bar">
        <label class="search"><span class="hidden">Search papers</span>
          <input type="search" placeholder="Search titles, abstracts, authors, methods" value={words} onInput={(event) => { setWords(event.currentTarget.value); setRows(60); }} />
        </label>
        <Choose label="State" value={query.get("state") ?? ""} options={STATES} change={(value) => change("state", value)} />
        <Choose label="Kind" value={query.get("kind") ?? ""} options={[["", "any kind"], ...(shown?.kinds ?? []).map((kind): [string, string] => [kind, kind])]} change={(value) => change("kind", value)} />
        <label class="tick"><input type="checkbox" checked={query.has("marked")} onChange={(event) => change("marked", event.currentTarget.checked ? "1" : "")} /> marked</label>
      </div>
      <div class="tabs" role="group" aria-label="Which papers">
        {TABS.map(([name, text]) => <button type="button" aria-pressed={view === name && !asked.trim()} onClick={() => { setWords(""); change("view", name); }}>{text}</button>)}
        {moving && shown && (
          <span class="moving">
            <button type="button" class="quiet" disabled={!shown.before} onClick={() => change("day", shown.before ?? "")}>← earlier</button>
            <b class="num">{shown.first === shown.last ? shown.first : `${shown.first} to ${shown.last}`}</b>
            <button type="button" class="quiet" disabled={!shown.after} onClick={() => change("day", shown.after ?? "")}>later →</button>
          </span>
        )}
        {view === "trending" && !asked.trim() && <span class="note">likes / (1 + days since publication)</span>}
      </div>
      {failed && <Failed message={failed} />}
      {!shown && !failed && <div class="waiting" aria-busy="true">Opening the store of papers …</div>}
      {shown && !shown.papers.length && <NoPapers shown={shown} words={asked.trim()} dated={view !== "all"} />}
      <ul class="papers" aria-label="Papers">{shown?.papers.map((paper) => <li key={paper.name}><PaperCard paper={paper} /></li>)}</ul>
      {shown && shown.more > 0 && <button type="button" class="more" onClick={() => setRows(rows + 120)}>More papers</button>}
    </>
  );
}

function Choose({ label, value, options, change }: { label: string; value: string; options: [string, string][]; change: (value: string) => void }) {
  return (
    <label class="pick"><span class="hidden">{label}</span>
      <select aria-label={label} value={value} onChange={(event) => change(event.currentTarget.value)}>{options.map(([name, text]) => <option value={name}>{text}</option>)}</select>
    </label>
  );
}

function NoPapers({ shown, words, dated }: { shown: Papers; words: string; dated: boolean }) {
  if (dated && !words && !shown.dated)
    return (
      <Empty title="No feed has been read yet">
        <p>What is published comes from a feed: <code>patchbay papers sync hugging-face</code>, <code>arxiv</code>, or a saved Daily Papers page. The catalogue's {shown.of} papers are under <a href="#/papers?view=all">All</a>.</p>
      </Empty>
    );
  return <Empty title={words ? `No paper has all of “${words}”` : "No papers here"}><p>Fewer words or filters find more of {shown.of.toLocaleString("en")}.</p></Empty>;
}

/** Text in which what was searched for is marked. */
function Marked({ text }: { text: string }) {
  return <>{text.split(/\x02([^\x03]*)\x03/).map((piece, i) => (i % 2 ? <mark>{piece}</mark> : piece))}</>;
}

function by(paper: Paper): string {
  const named = paper.authors.slice(0, 3).join(", ");
  const all = Math.max(paper.n_authors ?? 0, paper.authors.length);
  if (!named) return paper.organization || (all ? `${all} author${all === 1 ? "" : "s"}` : "");
  return all > 3 ? `${named} and ${all - 3} more` : named;
}

function PaperCard({ paper }: { paper: Paper }) {
  return (
    <article class="paper">
      <div class="paper-side num">{paper.likes !== null && <span class="likes" title="likes"><b>{paper.likes.toLocaleString("en")}</b><small>likes</small></span>}</div>
      <div class="paper-body">
        <h2><a href={`#/paper/${encodeURIComponent(paper.name)}`}><Marked text={paper.marked_title ?? paper.title} /></a></h2>
        <p class="paper-line">
          <span class={`state ${paper.state === "works" ? "done" : paper.state === "partly" ? "running" : ""}`}>{SAID[paper.state] ?? paper.state}</span>
          {paper.verdict && <span class={`state ${verdictLook(paper.verdict)}`}>{paper.verdict}</span>}
          {paper.marked && <span class="state">marked</span>}
          <span>{[by(paper), paper.published ?? paper.year, paper.kind].filter(Boolean).join(" · ")}</span>
        </p>
        {paper.snippet && <p class="snippet"><Marked text={paper.snippet} /></p>}
        <Methods methods={paper.methods} />
      </div>
    </article>
  );
}

function verdictLook(verdict: string): string {
  return verdict.startsWith("confirmed") ? "done" : verdict.startsWith("not confirmed") ? "failed" : "";
}

function Methods({ methods }: { methods: string[] }) {
  if (!methods.length) return null;
  return <ul class="chips">{methods.map((name) => <li>{/^(find|prove|turn|decode|train|measure)\./.test(name) ? <a href={`#/${name.replace(".", "/")}`}>{name}</a> : <span>{name}</span>}</li>)}</ul>;
}

export function PaperPage({ name, state }: { name: string; state: State | null }) {
  const [changed, setChanged] = useState(0);
  const checked = (state?.runs ?? []).filter((one) => one.room === "papers" && one.state === "done").length;
  const { got, failed } = useGet<WholePaper>(`/api/paper?name=${encodeURIComponent(name)}`, `${changed} ${checked}`);
  const [refused, setRefused] = useState("");
  if (failed) return <Failed message={failed}><p><a href="#/papers">All papers</a></p></Failed>;
  if (!got) return <div class="waiting" aria-busy="true">Reading the paper …</div>;
  const run = [...(state?.runs ?? [])].reverse().find((one) => one.room === "papers" && one.method === got.key);
  const going = run && ["queued", "running", "stopping"].includes(run.state);
  const check = () => post("/api/papers/check", { key: got.key }).then(() => setRefused(""), (error: Error) => setRefused(error.message));
  const mark = () => post("/api/papers/mark", { name, marked: got.marked ? 0 : 1 }).then(() => setChanged(changed + 1), (error: Error) => setRefused(error.message));
  const days = got.likes_by_day.filter((one) => one.likes !== null);
  return (
    <>
      <PageHead title={got.title} back={{ to: "#/papers", text: "Papers" }} lead={[got.authors.length ? got.authors.slice(0, 12).join(", ") + (got.authors.length > 12 ? ` and ${got.authors.length - 12} more` : "") : by(got), got.published ?? got.year].filter(Boolean).join(" · ")}>
        <div class="exports">
          {got.address && <a href={got.address} target="_blank" rel="noreferrer">arXiv {got.arxiv}</a>}
          {/^https:\/\//.test(got.code) && <a href={got.code} target="_blank" rel="noreferrer">Code</a>}
          {got.likes !== null && <span class="num">{got.likes} likes</span>}
          <button type="button" class="quiet" aria-pressed={got.marked} onClick={mark}>{got.marked ? "Take the mark away" : "Mark"}</button>
        </div>
      </PageHead>
      {refused && <Failed message={refused} />}
      <Panel title="What of it runs here" aside={<span class={`state ${got.state === "works" ? "done" : got.state === "partly" ? "running" : ""}`}>{SAID[got.state] ?? got.state}</span>}>
        {got.does && <p>{got.does}.</p>}
        {got.headline && <p class="note">{got.headline}</p>}
        <Methods methods={got.methods} />
        {!got.key && <p class="note">The catalogue has no entry for it. In a checkout, <code>patchbay papers add {got.arxiv ?? "TITLE"} --name METHOD</code> begins one.</p>}
        {got.claim && (
          <dl class="claim">
            <dt>Claim</dt><dd>{got.claim}</dd>
            {got.measured && <><dt>Measured{got.model ? ` on ${got.model}` : ""}</dt><dd>{got.measured}</dd></>}
          </dl>
        )}
        {got.verdicts.map((one) => (
          <details class="verdict">
            <summary><span class={`state ${verdictLook(one.verdict)}`}>{one.verdict}</span> on {one.model}, <span class="num">{one.at.slice(0, 10)}</span></summary>
            <p class="said">{one.told}</p>
            <p class="note">Weights <code>{one.weights}</code></p>
          </details>
        ))}
        {got.claim && (
          <div class="form-foot">
            <button type="button" class="primary" disabled={state?.model.state !== "ready" || going} onClick={check}>Check the claim{state?.model.source ? ` on ${state.model.source}` : ""}</button>
            {state?.model.state === "none" && <span class="note">Start <code>patchbay ui MODEL</code> to check it.</span>}
            {got.command && <span class="note"><code>{got.command}</code> <Copy text={() => got.command} /></span>}
          </div>
        )}
        {run && <RunCard run={run} />}
      </Panel>
      {got.abstract && <Panel title="Abstract"><p class="abstract">{got.abstract}</p></Panel>}
      {days.length > 1 && <Panel title="Likes"><Curve x={days.map((one) => Date.parse(one.day) / 86_400_000 - Date.parse((days[0] as { day: string }).day) / 86_400_000)} lines={[{ name: "likes", y: days.map((one) => one.likes as number) }]} axis={`days since ${(days[0] as { day: string }).day}`} unit="likes" label="Likes by day" /></Panel>}
      {got.similar.length > 0 && (
        <Panel title="Papers like it" aside={<span class="note">by the words that mark them (tf-idf)</span>}>
          <ul class="near">{got.similar.map((one) => <li><a href={`#/paper/${encodeURIComponent(one.name)}`}>{one.title}</a> <span class="note">{[one.year, SAID[one.state] ?? one.state, one.heat ? number(one.heat) : ""].filter(Boolean).join(" · ")}</span></li>)}</ul>
        </Panel>
      )}
    </>
  );
}

