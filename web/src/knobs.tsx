// Knobs as sliders: a prompt, how likely the next tokens are without and with them as they turn, and both continuations side by side.

import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { go } from "./app";
import { address, post, useGet, useLook, type Entry, type Next, type State } from "./api";
import { number, visible } from "./data";
import { Copy, Empty, Failed, Panel } from "./parts";
import { PageHead } from "./results";

const EXAMPLE = "The capital of Lolavia is Grerum. Emma asked Kate about the violin. The capital of Lolavia is";
const NEW = 24;

interface Knob {
  name: string;
  message: string;
  called?: string;
  neutral: number;
  strength: number;
  low: number;
  high: number;
  edits: string[];
  n_edits: number;
}

interface Turned {
  next: Next[];
  kl: number;
  notes: string[];
  before?: string;
  after?: string;
}

interface Piece {
  side: "before" | "after";
  token: string;
}

type Strengths = Record<string, number>;

function strengthsOf(query: URLSearchParams): Strengths {
  return Object.fromEntries((query.get("knobs") ?? "").split("+").filter(Boolean).map((one) => {
    const at = one.lastIndexOf("@");
    return [one.slice(0, at), Number(one.slice(at + 1))];
  }).filter(([name, value]) => name && Number.isFinite(value)));
}

export function KnobsPage({ query, state }: { query: URLSearchParams; state: State | null }) {
  const listed = useGet<Entry[]>("/api/results", state?.results ?? 0);
  const model = state?.model.state;
  const names = useMemo(() => (listed.got ?? []).filter((one) => one.kind === "knob").map((one) => one.name).slice(0, 64), [listed.got]);
  const held = useLook<{ knobs: Knob[] }>(model === "ready" && names.length ? { what: "knobs", names } : null);
  const [text, setText] = useState(query.get("text") ?? EXAMPLE);
  const [strengths, setStrengths] = useState<Strengths>(() => strengthsOf(query));
  const asked = useRef(0);
  useEffect(() => {
    // The address names what is shown, so that a reload or another tab shows the same.
    clearTimeout(asked.current);
    asked.current = window.setTimeout(() => {
      const knobs = Object.entries(strengths).map(([name, value]) => `${name}@${Number(value.toFixed(4))}`).join("+");
      history.replaceState(null, "", `#/knobs?${new URLSearchParams({ text, ...(knobs ? { knobs } : {}) })}`);
    }, 250);
    return () => clearTimeout(asked.current);
  }, [text, strengths]);
  const head = <PageHead title="Knobs" lead="Turn a knob and see what it does to a text, as it turns." />;
  if (model === "none") return <>{head}<Empty title="No model is open"><p>Start <code>patchbay ui MODEL</code>, such as <code>patchbay ui tiny</code>.</p></Empty></>;
  if (model === "failed") return <>{head}<Failed message={state?.model.message ?? ""} /></>;
  if (listed.failed) return <>{head}<Failed message={listed.failed} /></>;
  if (listed.got && !names.length)
    return (
      <>
        {head}
        <Empty title="No knobs here yet">
          <p>Make one on <a href="#/turn">Turn</a>: <a href={`#/turn/scale?${new URLSearchParams({ given: JSON.stringify({ parts: "L1.H1", strength: "0" }), name: "head-off" })}`}>turn one head off</a> is the shortest. A <code>.knob</code> file that is copied into {<code>results</code>} is here too.</p>
        </Empty>
      </>
    );
  const knobs = held.got?.knobs ?? [];
  const usable = knobs.filter((one) => !one.message);
  const given = usable.map((one) => ({ name: one.name, strength: strengths[one.name] ?? one.neutral }));
  return (
    <>
      {head}
      {held.failed && <Failed message={held.failed} />}
      <div class="turn-page">
        <Panel title={`${knobs.length || names.length} knob${names.length === 1 ? "" : "s"}`} aside={<button type="button" class="quiet" disabled={!given.some((one) => one.strength !== usable.find((knob) => knob.name === one.name)?.neutral)} onClick={() => setStrengths({})}>All neutral</button>}>
          {!held.got && !held.failed && <div class="waiting" aria-busy="true">{model === "loading" ? "The model is loading …" : "Reading the knobs …"}</div>}
          {knobs.map((knob) => <Slider key={knob.name} knob={knob} value={strengths[knob.name] ?? knob.neutral} turn={(value) => setStrengths((before) => ({ ...before, [knob.name]: value }))} />)}
        </Panel>
        <div class="turn-side">
          <Panel>
            <label class="turn-label" for="turn-text">Prompt</label>
            <textarea id="turn-text" rows={3} value={text} onInput={(event) => setText(event.currentTarget.value)} />
          </Panel>
          {text && held.got && <Effect text={text} given={given} neutral={usable.every((one) => (strengths[one.name] ?? one.neutral) === one.neutral)} />}
        </div>
      </div>
    </>
  );
}

function Slider({ knob, value, turn }: { knob: Knob; value: number; turn: (value: number) => void }) {
  const id = `knob-${knob.name}`;
  const [saved, setSaved] = useState("");
  if (knob.message) return <div class="slider"><b>{knob.name}</b><p class="failed" role="alert">{knob.message}</p></div>;
  const step = (knob.high - knob.low) / 200;
  const far = knob.high - knob.low;
  const at = (where: number) => `${(100 * (where - knob.low)) / far}%`;
  const keep = () => post<{ name: string }>("/api/knob", { name: knob.name, strength: value, saved: "" }).then((made) => setSaved(`saved as ${made.name}`), (error: Error) => setSaved(error.message));
  return (
    <div class={`slider ${value === knob.neutral ? "" : "turned"}`}>
      <div class="slider-head">
        <label for={id}>{knob.name.replace(/\.knob$/, "")}</label>
        <input class="num" type="number" step="any" value={Number(value.toFixed(3))} aria-label={`Strength of ${knob.name}`} onChange={(event) => Number.isFinite(event.currentTarget.valueAsNumber) && turn(event.currentTarget.valueAsNumber)} />
      </div>
      <input id={id} type="range" min={Math.min(knob.low, value)} max={Math.max(knob.high, value)} step={step} value={value} aria-valuetext={`${number(value)}${value === knob.neutral ? ", neutral" : ""}`} onInput={(event) => turn(near(Number(event.currentTarget.value), knob, step))} />
      <div class="slider-marks num" aria-hidden="true">
        <span style={{ left: at(knob.neutral) }}>{number(knob.neutral)} neutral</span>
        {knob.strength !== knob.neutral && Math.abs(knob.strength - knob.neutral) > 0.24 * far && <span style={{ left: at(knob.strength) }}>{number(knob.strength)} saved</span>}
      </div>
      <div class="slider-foot">
        <code title={knob.edits.join("\n")}>{knob.edits[0]}{knob.n_edits > 1 ? ` and ${knob.n_edits - 1} more` : ""}</code>
        <span class="slider-does">
          <button type="button" class="quiet" disabled={value === knob.neutral} onClick={() => turn(knob.neutral)}>Neutral</button>
          <button type="button" class="quiet" disabled={value === knob.strength} onClick={keep}>Save here</button>
          <a class="quiet" href={`#/results/${address(knob.name)}`}>Evidence</a>
          <button type="button" class="quiet" onClick={() => go(`measure/dose_response?${new URLSearchParams({ given: JSON.stringify({ knob: knob.name }) })}`)}>Dose-response</button>
        </span>
      </div>
      {saved && <p class="note" role="status">{saved}</p>}
    </div>
  );
}

/** Neutral holds a slider that comes near. */
function near(value: number, knob: Knob, step: number): number {
  return Math.abs(value - knob.neutral) < 1.5 * step ? knob.neutral : Number(value.toFixed(6));
}

function Effect({ text, given, neutral }: { text: string; given: { name: string; strength: number }[]; neutral: boolean }) {
  const now = useLook<Turned>({ what: "turned", text, knobs: given });
  const last = useRef<Turned | null>(null);
  if (now.got) last.current = now.got;
  const shown = now.got ?? last.current;
  const [settled, settle] = useState({ text, given });
  const key = JSON.stringify([text, given]);
  useEffect(() => {
    const timer = window.setTimeout(() => settle({ text, given }), 400);
    return () => clearTimeout(timer);
  }, [key]);
  return (
    <>
      <Panel title="What comes next" aside={shown && <span class="note num">KL {number(shown.kl)} nats</span>}>
        {now.failed && <Failed message={now.failed} />}
        {!shown && !now.failed && <div class="waiting" aria-busy="true">The model is reading …</div>}
        {shown && <Nexts rows={shown.next} before="without" after={neutral ? "all neutral" : "with the knobs"} />}
        {shown?.notes.map((note) => <p class="note">{note}</p>)}
      </Panel>
      <Continued key={JSON.stringify(settled)} {...settled} />
    </>
  );
}

export function Nexts({ rows, before, after }: { rows: Next[]; before: string; after: string }) {
  return (
    <>
      <ol class="nexts">
        {rows.map((row) => (
          <li>
            <code>{visible(row.token)}</code>
            <span class="nexts-bars">
              <i class="was" style={{ width: `${100 * row.before}%` }} />
              <i class="is" style={{ width: `${100 * row.after}%` }} />
            </span>
            <span class="num">{number(row.before)}</span>
            <span class="num strong">{number(row.after)}</span>
          </li>
        ))}
      </ol>
      <p class="key"><span><i class="key-was" />{before}</span><span><i class="key-is" />{after}</span></p>
    </>
  );
}

function Continued({ text, given }: { text: string; given: { name: string; strength: number }[] }) {
  const [heard, hear] = useState({ before: [] as string[], after: [] as string[] });
  const { got, failed } = useLook<Turned, Piece>({ what: "turned", text, knobs: given, new: NEW }, (piece) => hear((held) => ({ ...held, [piece.side]: [...held[piece.side], piece.token] })));
  const same = heard.before.findIndex((token, i) => heard.after[i] !== token);
  const side = (name: "before" | "after", title: string) => (
    <div>
      <h3>{title}</h3>
      <p class="text" aria-live="polite">
        {heard[name].map((token, i) => <span class={name === "after" && same >= 0 && i >= same ? "differs" : ""}>{token}</span>)}
        {!got && !failed && <span class="caret" aria-hidden="true" />}
        {got && !heard[name].length && <span class="note">{got[name] || "The model ends the text here."}</span>}
      </p>
    </div>
  );
  return (
    <Panel title="How the text goes on" aside={<span class="note">greedy, up to {NEW} tokens</span>}>
      {failed ? <Failed message={failed} /> : <div class="sides">{side("before", "Without")}{side("after", "With the knobs")}</div>}
      {got && <Copy label="Copy both" text={() => `without: ${text}${got.before ?? ""}\nwith: ${text}${got.after ?? ""}\n`} />}
    </Panel>
  );
}
