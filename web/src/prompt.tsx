// One prompt: its tokens by how surprising they were, what comes next, the logit lens, and where each head looks.

import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { go } from "./app";
import { useLook, type Next, type Prompt, type State } from "./api";
import { number, valuesOf, variable, visible, type ResultDoc } from "./data";
import { Heat } from "./heat";
import { Nexts } from "./knobs";
import { Empty, Failed, Panel } from "./parts";
import { PageHead } from "./results";
import { Show } from "./result";
import { Tokens } from "./tokens";

const EXAMPLE = "The capital of Lolavia is Grerum. Emma asked Kate about the violin. The capital of Lolavia is";

export function PromptPage({ query, state }: { query: URLSearchParams; state: State | null }) {
  const asked = query.get("text") ?? "";
  const [text, setText] = useState(asked);
  const model = state?.model.state;
  const { got, failed, busy } = useLook<Prompt>(model === "ready" && asked ? { what: "prompt", text: asked } : null);
  useEffect(() => setText(asked), [asked]);
  const submit = (event: Event) => {
    event.preventDefault();
    if (text) go(`prompt?${new URLSearchParams({ text })}`);
  };
  return (
    <>
      <PageHead title="Prompt" />
      <form class="panel ask" onSubmit={submit}>
        <label for="text" class="hidden">Prompt</label>
        <textarea id="text" rows={3} value={text} placeholder="A text for the model to read" onInput={(event) => setText(event.currentTarget.value)}
          onKeyDown={(event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit(event); }} />
        <div class="form-foot">
          <button type="submit" class="primary" disabled={!text || model === "none" || model === "failed"}>Read it</button>
          {!text && <button type="button" class="quiet" onClick={() => setText(EXAMPLE)}>An example</button>}
          <span class="note">Ctrl + Enter</span>
        </div>
      </form>
      {model === "none" && <Empty title="No model is open"><p>Start <code>patchbay ui MODEL</code>, such as <code>patchbay ui tiny</code>.</p></Empty>}
      {model === "failed" && <Failed message={state?.model.message ?? ""} />}
      {failed && <Failed message={failed} />}
      {asked && !got && !failed && (busy || model === "loading") && <div class="waiting" aria-busy="true">{model === "loading" ? "The model is loading …" : state?.runs.some((run) => run.state === "running") ? "Waiting for the run to end …" : "The model is reading …"}</div>}
      {got && asked && <Read got={got} text={asked} />}
    </>
  );
}

function Read({ got, text }: { got: Prompt; text: string }) {
  const tokens = got.tokens;
  const surprise = variable(got.next, "surprise");
  const [chosen, setChosen] = useState<number | null>(null);
  const place = chosen ?? tokens.length - 1;
  const rows = (got.next.tables["next"]?.rows ?? []).filter((row) => row["position"] === place);
  return (
    <>
      <Panel title={`${tokens.length} tokens`} aside={<span class="note">by surprise at each, {surprise?.unit}</span>}>
        <div class={tokens.length > 160 ? "tokens-scroll" : ""} tabIndex={tokens.length > 160 ? 0 : undefined}>
          <Tokens tokens={tokens} values={surprise ? (valuesOf(surprise) ?? undefined) : undefined} unit={surprise?.unit ?? ""} label="Tokens of the prompt; choose one to see what comes after it" chosen={place} onPick={setChosen} legend />
        </div>
      </Panel>
      <Panel title={`What comes after ${place} ${visible(tokens[place] ?? "")}`}>
        {rows.length ? (
          <ol class="next">
            {rows.map((row) => (
              <li>
                <code>{visible(String(row["token"]))}</code>
                <span class="next-bar"><i style={{ width: `${100 * Number(row["probability"])}%` }} /></span>
                <span class="num">{number(row["probability"])}</span>
              </li>
            ))}
          </ol>
        ) : <p class="note">Listed are the last 64 positions.</p>}
        <p class="note">Why? <code>patchbay why</code> of this prompt: <a href={`#/find/logit_lens?${new URLSearchParams({ given: JSON.stringify({ prompt: text }) })}`}>logit lens</a></p>
      </Panel>
      {got.lens ? <Panel title="Logit lens" class="plain"><Show doc={got.lens} /></Panel> : <Panel title="Logit lens"><p class="note">{got.lens_message}</p></Panel>}
      <Patching text={text} n={tokens.length} />
      {got.heads.some(Boolean) && <Heads text={text} heads={got.heads} />}
    </>
  );
}

interface Patched {
  tokens: string[];
  others: string[];
  ours: string;
  theirs: string;
  n_layers: number;
  clean: number;
  other: number;
}

/** Patch from another prompt: the map fills layer by layer as the sweep runs; a cell that is chosen shows what comes next under its patch. */
function Patching({ text, n }: { text: string; n: number }) {
  const [other, setOther] = useState("");
  const [asked, ask] = useState("");
  useEffect(() => ask(""), [text]);
  const submit = (event: Event) => {
    event.preventDefault();
    ask(other);
  };
  return (
    <Panel title="Patch from another prompt">
      <form class="patch-form" onSubmit={submit}>
        <label class="hidden" for="other">Another prompt</label>
        <textarea id="other" rows={2} value={other} placeholder={`A prompt of ${n} tokens with another answer: where does what differs sit?`} onInput={(event) => setOther(event.currentTarget.value)} />
        <div class="form-foot">
          <button type="submit" class="primary" disabled={!other.trim() || other === text}>Patch every cell</button>
          {!other && <button type="button" class="quiet" onClick={() => setOther(text)}>Begin with this prompt</button>}
        </div>
      </form>
      {asked && <PatchMap key={`${text}\n${asked}`} text={text} other={asked} n={n} />}
    </Panel>
  );
}

function PatchMap({ text, other, n }: { text: string; other: string; n: number }) {
  const [rows, setRows] = useState<{ layer: number; values: number[] }[]>([]);
  const { got, failed } = useLook<Patched, { layer: number; values: number[] }>({ what: "patching", text, other }, (row) => setRows((before) => [...before, row]));
  const [picked, pick] = useState<[number, number] | null>(null);
  const cell = useLook<{ next: Next[]; edit: string }>(picked ? { what: "cell", text, other, layer: picked[0], position: picked[1] } : null);
  const values = useMemo(() => Float64Array.from(rows.flatMap((row) => row.values)), [rows]);
  if (failed) return <Failed message={failed} />;
  if (!rows.length) return <div class="waiting" aria-busy="true">Patching the first layer …</div>;
  const tokens = got?.tokens ?? Array.from({ length: n }, (_, i) => String(i));
  const named = tokens.map((token, i) => (got && got.others[i] !== token ? `${visible(token)} ← ${visible(got.others[i] ?? "")}` : visible(token)));
  return (
    <>
      <p class="note" role="status">
        {got ? <>Logit of <code>{visible(got.theirs)}</code> over <code>{visible(got.ours)}</code> with the other prompt's stream in one place; {number(got.clean)} without, {number(got.other)} in the other prompt. Choose a cell.</> : `${rows.length} layers done …`}
      </p>
      <Heat values={values} rows={rows.map((row) => `L${row.layer}`)} columns={named} axes={["layer", "position"]} unit="logits" label="Logit of the other answer over this one's" upward
        {...(got ? { range: [Math.min(got.clean, got.other, ...values), Math.max(got.clean, got.other, ...values)] as [number, number] } : {})}
        onPick={(row, column) => pick([rows[row]?.layer ?? row, column])} picked={picked ? picked[0] * n + picked[1] : null} />
      {cell.failed && <Failed message={cell.failed} />}
      {picked && !cell.failed && (cell.got ? <div class="cell-told"><h3><code>{cell.got.edit}</code></h3><Nexts rows={cell.got.next} before="as it was" after="patched" /></div> : <div class="waiting" aria-busy="true">Patching L{picked[0]} at {picked[1]} …</div>)}
    </>
  );
}

interface Thumbs {
  side: number;
  heads: { head: number; data: number[] }[];
}

function Heads({ text, heads }: { text: string; heads: number[] }) {
  const first = heads.findIndex(Boolean);
  const [layer, setLayer] = useState(first);
  const [head, setHead] = useState(0);
  const thumbs = useLook<Thumbs>({ what: "heads", text, layer });
  const whole = useLook<ResultDoc>({ what: "pattern", text, layer, head });
  return (
    <Panel title="Where heads look" aside={
      <label class="pick"><span>layer</span>
        <select value={String(layer)} onChange={(event) => { setLayer(Number(event.currentTarget.value)); setHead(0); }}>
          {heads.map((n, i) => (n ? <option value={String(i)}>L{i}</option> : null))}
        </select>
      </label>}>
      {thumbs.failed && <Failed message={thumbs.failed} />}
      <div class="thumbs" role="group" aria-label={`Heads of layer ${layer}`}>
        {(thumbs.got?.heads ?? []).map((one) => (
          <button type="button" aria-pressed={one.head === head} onClick={() => setHead(one.head)}>
            <Thumb side={thumbs.got?.side ?? 1} data={one.data} />
            L{layer}.H{one.head}
          </button>
        ))}
      </div>
      {whole.failed && <Failed message={whole.failed} />}
      {whole.got ? <div class="nested"><Show doc={whole.got} /></div> : !whole.failed && <div class="waiting" aria-busy="true">Reading L{layer}.H{head} …</div>}
    </Panel>
  );
}

function Thumb({ side, data }: { side: number; data: number[] }) {
  const board = useRef<HTMLCanvasElement>(null);
  useEffect(() => {
    const pen = board.current?.getContext("2d");
    if (!pen) return;
    const image = pen.createImageData(side, side);
    data.forEach((share, i) => image.data.set([34, 120, 186, Math.round(255 * Math.sqrt(Math.max(0, Math.min(1, share))))], 4 * i));
    pen.clearRect(0, 0, side, side);
    pen.putImageData(image, 0, 0);
  }, [data, side]);
  return <canvas ref={board} width={side} height={side} aria-hidden="true" />;
}
