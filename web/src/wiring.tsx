// Wiring: layers as columns, parts as jacks, channels or edges as cables whose width is their score. Filters by score, by what reads,
// by proof, and by the part that is chosen.

import { useMemo, useRef, useState } from "preact/hooks";
import { number, type Cable, type ResultDoc } from "./data";
import { useWidth } from "./parts";

const ROW = 34;
const JACK = 62;
const TOP = 34;

interface Jack {
  part: string;
  column: number;
  row: number;
}

interface End {
  part: string; // as a jack: the part without its component or how it reads
  column: string;
  reads: string;
}

const READS: Record<string, string> = { q: "queries", k: "keys", v: "values" };

/** Where a cable ends: `L0.H1.C3`, `L2.H0.q`, `L1.KV3.v`, `embed.positions`, `logits`. */
function end(text: string): End {
  const found = /^L(\d+)\.(.+)$/.exec(text);
  if (!found) return /^(embed|positions)/.test(text) ? { part: text.split(".")[0] as string, column: "in", reads: "" } : { part: text, column: "out", reads: "output" };
  const [, layer, rest] = found as unknown as [string, string, string];
  const reads = /\.(q|k|v)$/.exec(rest)?.[1] ?? "";
  const part = rest.replace(/\.(q|k|v)$/, "").replace(/\.(C\d+|bias|in|out)$/, "");
  return { part: `L${layer}.${part}`, column: layer, reads: reads ? (READS[reads] as string) : /^(mlp|E\d|router|N\d)/.test(part) ? "MLPs" : "other" };
}

function rank(part: string): number {
  const found = /\.(H|KV|E|N|attn|mlp)(\d*)/.exec(part);
  const order = ["H", "KV", "attn", "mlp", "E", "N"].indexOf(found?.[1] ?? "");
  return order * 1e6 + Number(found?.[2] ?? 0);
}

function laid(cables: Cable[]): { jacks: Map<string, Jack>; columns: string[]; rows: number } {
  const columns = new Map<string, Set<string>>();
  for (const cable of cables)
    for (const one of [end(cable.from), end(cable.to)]) columns.set(one.column, (columns.get(one.column) ?? new Set()).add(one.part));
  const order = [...columns.keys()].sort((a, b) => (a === "in" ? -1 : b === "in" ? 1 : a === "out" ? 1 : b === "out" ? -1 : Number(a) - Number(b)));
  const jacks = new Map<string, Jack>();
  let rows = 0;
  order.forEach((column, x) => {
    const parts = [...(columns.get(column) as Set<string>)].sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
    rows = Math.max(rows, parts.length);
    parts.forEach((part, y) => jacks.set(part, { part, column: x, row: y }));
  });
  for (const jack of jacks.values()) {
    const tall = [...jacks.values()].filter((one) => one.column === jack.column).length;
    jack.row += (rows - tall) / 2;
  }
  return { jacks, columns: order, rows };
}

export function Wiring({ doc, link }: { doc: ResultDoc; link?: ((part: string) => string | undefined) | undefined }) {
  const held = doc.cables as NonNullable<ResultDoc["cables"]>;
  const outer = useRef<HTMLDivElement>(null);
  const width = useWidth(outer);
  const [most, setMost] = useState(Math.min(held.lines.length, held.smallest ?? 24));
  const [reads, setReads] = useState("");
  const [proved, setProved] = useState(false);
  const [part, setPart] = useState("");
  const [at, setAt] = useState<number | null>(null);
  const known = held.lines.some((one) => one.p !== null);
  const kinds = useMemo(() => [...new Set(held.lines.map((one) => end(one.to).reads).filter(Boolean))].sort(), [held]);
  const { jacks, columns, rows } = useMemo(() => laid(held.lines), [held]);
  const shown = held.lines
    .map((cable, i) => ({ cable, i, from: end(cable.from), to: end(cable.to) }))
    .slice(0, most)
    .filter(({ cable, from, to }) => (!reads || to.reads === reads) && (!proved || (cable.p !== null && cable.p <= 0.05)) && (!part || from.part === part || to.part === part));
  const largest = Math.max(...held.lines.map((one) => Math.abs(one.score)), 1e-12);
  const gap = Math.max(118, (width - JACK - 8) / Math.max(1, columns.length - 1));
  const [wide, high] = [gap * (columns.length - 1) + JACK + 8, TOP + rows * ROW + 6];
  const x = (jack: Jack) => 4 + jack.column * gap;
  const y = (jack: Jack) => TOP + (jack.row + 0.5) * ROW;
  const lit = new Set(shown.flatMap(({ from, to }) => [from.part, to.part]));
  const told = shown.find((one) => one.i === at);
  const card = part ? link?.(part) : undefined;
  return (
    <div class="wiring" ref={outer}>
      <div class="wiring-bar">
        <label class="wiring-most">strongest <input type="range" min={1} max={held.lines.length} value={most} onInput={(event) => setMost(Number(event.currentTarget.value))} aria-valuetext={`${most} of ${held.lines.length}`} /> <b class="num">{most}</b> of {held.n}</label>
        {kinds.length > 1 && <label class="pick"><span>read by</span><select value={reads} onChange={(event) => setReads(event.currentTarget.value)}><option value="">all</option>{kinds.map((kind) => <option value={kind}>{kind}</option>)}</select></label>}
        {known && <label class="tick"><input type="checkbox" checked={proved} onChange={(event) => setProved(event.currentTarget.checked)} /> adjusted p ≤ 0.05</label>}
        {part && <button type="button" class="quiet" onClick={() => setPart("")}>All parts (now {part})</button>}
      </div>
      <output class="readout" aria-live="polite">
        {told ? <><b class="num">{number(told.cable.score)}</b> <span class="where">{told.cable.from} → {told.cable.to}{told.cable.p === null ? "" : ` · p ${number(told.cable.p)}`} · number {told.i + 1}</span></>
          : <span class="hint">{shown.length} cable{shown.length === 1 ? "" : "s"}: point at one, or choose a part{held.smallest ? `; the first ${held.smallest} are the circuit` : ""}</span>}
      </output>
      <div class="wiring-scroll" tabIndex={0} role="region" aria-label="Wiring, layers from left to right">
        <svg width={wide} height={high} viewBox={`0 0 ${wide} ${high}`} role="group" aria-label={`${shown.length} cables between ${jacks.size} parts`}>
          {columns.map((column, i) => <text class="wiring-layer" x={4 + i * gap + JACK / 2} y={16} text-anchor="middle">{column === "in" ? "text" : column === "out" ? "output" : `layer ${column}`}</text>)}
          {[...shown].reverse().map(({ cable, i, from, to }) => {
            const [a, b] = [jacks.get(from.part) as Jack, jacks.get(to.part) as Jack];
            const [x0, y0, x1, y1] = [x(a) + JACK - 3, y(a), x(b) + 3, y(b)];
            const bend = Math.max(30, (x1 - x0) * 0.45);
            const size = Math.abs(cable.score) / largest;
            const inside = a.column === b.column; // attention to the MLP of its own layer: around the right of both
            const line = inside ? `M${x0} ${y0} C${x0 + 34} ${y0}, ${x0 + 34} ${y1}, ${x0} ${y1}` : `M${x0} ${y0} C${x0 + bend} ${y0}, ${x1 - bend} ${y1}, ${x1} ${y1}`;
            return (
              <g class={`cable ${cable.score < 0 ? "below" : ""} ${cable.p !== null && cable.p > 0.05 ? "unsure" : ""} ${at === i ? "chosen" : ""}`} onPointerEnter={() => setAt(i)} onPointerLeave={() => setAt(null)}>
                <path class="reach" d={line} />
                <path d={line} style={{ strokeWidth: `${1 + 6 * size}px`, opacity: String(0.3 + 0.7 * Math.sqrt(size)) }} />
              </g>
            );
          })}
          {[...jacks.values()].map((jack) => (
            <g class={`plug ${lit.has(jack.part) ? "lit" : ""} ${part === jack.part ? "chosen" : ""}`} role="button" tabindex={0} aria-pressed={part === jack.part} aria-label={`${jack.part}: its cables alone`}
              onClick={() => setPart(part === jack.part ? "" : jack.part)}
              onKeyDown={(event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); setPart(part === jack.part ? "" : jack.part); } }}>
              <rect x={x(jack)} y={y(jack) - 12} width={JACK} height={24} rx={12} />
              <text x={x(jack) + JACK / 2} y={y(jack) + 4} text-anchor="middle">{jack.part.replace(/^L\d+\./, "")}</text>
            </g>
          ))}
        </svg>
      </div>
      <p class="key">
        <span><i class="key-cable" />above 0, as wide as its score</span>
        {held.lines.some((one) => one.score < 0) && <span><i class="key-cable below" />below 0</span>}
        {known && <span><i class="key-cable unsure" />p above 0.05</span>}
        {card && <a href={card}>The card of {part}</a>}
      </p>
    </div>
  );
}
