// A Result as views, chosen by its axes: a map of two axes, bars of ranked parts, curves over an ordered axis, one number beside
// its control; then its tables, its notes, and where the numbers came from.

import { useEffect, useMemo, useState } from "preact/hooks";
import { Bars, type Bar } from "./bars";
import { Curve, type Line } from "./curve";
import {
  beside, methodName, number, placeOf, valuesOf, variable, words,
  type Doc, type KnobDoc, type ResultDoc, type Row, type Slices, type Values, type Variable,
} from "./data";
import { Heat } from "./heat";
import { OneNumber } from "./number";
import { Copy, Failed, Panel } from "./parts";
import { Table } from "./table";
import { Tokens } from "./tokens";
import { Wiring } from "./wiring";

const CURVED = new Set(["strength", "n_parts", "position", "query", "key", "draw", "prompt", "layer", "chunk", "offset"]);
const PLACES = new Set(["position", "query", "key"]);
const BARS = 24;

export { Figure };

export interface ShowProps {
  doc: Doc;
  slices?: Slices | undefined;
  link?: ((part: string) => string | undefined) | undefined;
}

export function Show({ doc, slices, link }: ShowProps) {
  return doc.kind === "knob" ? <Knob doc={doc} slices={slices} link={link} /> : <Result doc={doc} slices={slices} link={link} />;
}

function Result({ doc, slices, link }: { doc: ResultDoc; slices: Slices | undefined; link: ShowProps["link"] }) {
  const told = doc.sections.find((section) => section.name === "in short");
  const others = doc.sections.filter((section) => section !== told);
  return (
    <>
      {told && (
        <Panel title="In short" class="lead">
          {told.notes.map((note) => <p>{note}</p>)}
        </Panel>
      )}
      {doc.cables && <Panel title={doc.cables.smallest ? "Circuit" : "Wiring"} class="figure"><Wiring doc={doc} link={link} /></Panel>}
      <Figure doc={doc} slices={slices} link={link} />
      <TokenStrip doc={doc} />
      <Singles doc={doc} />
      {others.length > 0 && (
        <Panel title="What was found">
          {others.map((section) => (
            <div class="told-section">
              {section.rows.length ? <Table rows={section.rows} n={section.n} title={words(section.name)} link={partLink(link)} /> : <h3>{words(section.name)}</h3>}
              {section.notes.map((note) => <p class="note">{note}</p>)}
            </div>
          ))}
        </Panel>
      )}
      {doc.notes.length > 0 && (
        <Panel title="Notes">
          <ul class="notes">{doc.notes.map((note) => <li>{note}</li>)}</ul>
        </Panel>
      )}
      <Tables doc={doc} link={link} />
      <Whence provenance={doc.provenance} python={doc.python} />
    </>
  );
}

function Knob({ doc, slices, link }: { doc: KnobDoc; slices: Slices | undefined; link: ShowProps["link"] }) {
  return (
    <>
      <Panel title="What it does">
        <p>
          <b>{doc.name}</b> at strength <b class="num">{number(doc.strength)}</b>; neutral at {number(doc.neutral)}.{" "}
          {doc.n_edits} edit{doc.n_edits === 1 ? "" : "s"}.
        </p>
        <ul class="edits">{doc.edits.slice(0, 24).map((edit) => <li><code>{edit}</code></li>)}</ul>
        {doc.n_edits > 24 && <p class="note">and {doc.n_edits - 24} more</p>}
      </Panel>
      {Object.entries(doc.evidence).map(([name, held]) => (
        <>
          <h2 class="evidence">Evidence: {words(name)}</h2>
          <Result doc={held} slices={slices} link={link} />
        </>
      ))}
      <Whence provenance={doc.provenance} python="" />
    </>
  );
}

// --- the figure -----------------------------------------------------------------------------------

/** Variables that can stand in the figure: the main one first, then those of other axes or units that are no mere side of one. */
function choices(doc: ResultDoc): Variable[] {
  return doc.variables.filter((one) => (one.axes.length > 0 && one.shape.every((size) => size > 0)) || isNumber(doc, one));
}

/** Whether the Result is one number, with something to be seen beside it. */
function isNumber(doc: ResultDoc, one: Variable): boolean {
  const told = one.name === doc.main && one.axes.length === 0 && Number.isFinite(valuesOf(one)?.[0]);
  return told && Boolean(variable(doc, "low") ?? variable(doc, "null") ?? doc.tables["groups"]);
}

function Figure({ doc, slices, link }: { doc: ResultDoc; slices: Slices | undefined; link: ShowProps["link"] }) {
  const all = choices(doc);
  const [name, setName] = useState(doc.tables["dose"] && variable(doc, "effect") ? "effect" : doc.main);
  const chosen = all.find((one) => one.name === name) ?? all[0];
  if (!chosen) return null;
  const pick = all.length > 1 && (
    <label class="pick">
      <span>Shown</span>
      <select value={chosen.name} onChange={(event) => setName(event.currentTarget.value)}>
        {all.map((one) => <option value={one.name}>{words(one.name)}{one.axes.length ? ` (${one.axes.map(words).join(" × ")})` : ""}</option>)}
      </select>
    </label>
  );
  const title = chosen.unit && chosen.unit !== chosen.name ? `${sentence(words(chosen.name))}, ${chosen.unit}` : sentence(words(chosen.name));
  return (
    <Panel title={title} aside={pick} class="figure">
      <One doc={doc} chosen={chosen} slices={slices} link={link} />
    </Panel>
  );
}

function sentence(text: string): string {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

function One({ doc, chosen, slices, link }: { doc: ResultDoc; chosen: Variable; slices: Slices | undefined; link: ShowProps["link"] }) {
  const main = chosen.name === doc.main;
  if (!chosen.axes.length) return <OneNumber doc={doc} chosen={chosen} />;
  if (chosen.axes.length === 1) return <OneAxis doc={doc} chosen={chosen} main={main} link={link} />;
  const [first, second] = chosen.axes as [string, string];
  if (chosen.axes.length === 2 && isLines(first, second, doc)) return <ManyLines doc={doc} chosen={chosen} />;
  return (
    <div class={main && doc.ranked && (chosen.shape[1] as number) <= 12 ? "two" : "one"}>
      <div><Map doc={doc} chosen={chosen} slices={slices} /></div>
      {main && doc.ranked && <div><Ranked doc={doc} link={link} /></div>}
    </div>
  );
}

function isLines(first: string, second: string, doc: ResultDoc): boolean {
  const numeric = (axis: string) => CURVED.has(axis) && (doc.steps[axis] ?? []).every((step) => typeof step === "number");
  const cases = (axis: string) => axis === "condition" || axis === "draw";
  return (cases(first) && numeric(second)) || (cases(second) && numeric(first));
}

function OneAxis({ doc, chosen, main, link }: { doc: ResultDoc; chosen: Variable; main: boolean; link: ShowProps["link"] }) {
  const axis = chosen.axes[0] as string;
  const steps = doc.steps[axis] ?? [];
  const values = valuesOf(chosen);
  if (!values) return <TooLarge />;
  if (main && doc.ranked) return <Ranked doc={doc} link={link} />;
  if (CURVED.has(axis) && steps.every((step) => typeof step === "number") && steps.length > 1) {
    return (
      <Curve
        x={steps as number[]}
        lines={linesBeside(doc, chosen)}
        axis={words(axis)}
        unit={chosen.unit}
        label={`${words(chosen.name)} in ${chosen.unit}`}
      />
    );
  }
  const labels = doc.labels[axis] ?? [];
  const bars = Array.from(values, (value, i): Bar => ({ name: labels[i] ?? String(i), value, ...sides(doc, chosen, i) })).filter((bar) => !Number.isNaN(bar.value));
  const cut = [...bars].sort((a, b) => Math.abs(b.value) - Math.abs(a.value)).slice(0, BARS);
  const shown = bars.length > BARS ? bars.filter((bar) => cut.includes(bar)) : bars;
  return (
    <>
      {PLACES.has(axis) && <Tokens tokens={labels} values={values} unit={chosen.unit} label={words(chosen.name)} legend />}
      <Bars bars={shown} unit={chosen.unit} label={words(chosen.name)} />
      {bars.length > BARS && <p class="note">The {BARS} largest of {bars.length}, either sign.</p>}
    </>
  );
}

/** What stands on the two sides of a value: its interval, and the random control. */
function sides(doc: ResultDoc, chosen: Variable, i: number): Partial<Bar> {
  const of = (name: string) => (chosen.name === doc.main ? beside(doc, name)?.[i] : null) ?? null;
  const own = (end: string) => {
    const found = variable(doc, `${chosen.name}_${end}`);
    return found && found.axes.join() === chosen.axes.join() ? (valuesOf(found)?.[i] ?? null) : of(end);
  };
  return { low: own("low"), high: own("high"), nullMean: of("null_mean"), nullHigh: of("null_high"), nullLow: of("null_low") };
}

/** The chosen variable with its interval, and what chance gave in the same unit: a line, or a band alone. */
function linesBeside(doc: ResultDoc, chosen: Variable): Line[] {
  const same = doc.variables.filter((one) => one.axes.join() === chosen.axes.join() && one.unit === chosen.unit);
  const values = (name: string) => {
    const found = same.find((one) => one.name === name);
    return found ? valuesOf(found) : null;
  };
  const ends = (stem: string) => ({ low: values(`${stem}_low`), high: values(`${stem}_high`) });
  const own = ends(chosen.name).low ? ends(chosen.name) : chosen.name === doc.main ? { low: values("low"), high: values("high") } : {};
  const lines: Line[] = [{ name: words(chosen.name), y: valuesOf(chosen) ?? [], ...own }];
  for (const stem of ["null", "chance", "random"]) {
    const mean = values(`${stem}_mean`) ?? values(stem);
    const band = ends(stem);
    if (stem !== chosen.name && (mean || band.low)) lines.push({ name: "random control", y: mean ?? Array.from(chosen.data ? (valuesOf(chosen) ?? []) : [], () => NaN), ...band, control: true });
  }
  return lines;
}

function ManyLines({ doc, chosen }: { doc: ResultDoc; chosen: Variable }) {
  const values = valuesOf(chosen);
  if (!values) return <TooLarge />;
  const over = CURVED.has(chosen.axes[1] as string) && chosen.axes[1] !== "draw" ? 1 : 0;
  const [axis, other] = [chosen.axes[over] as string, chosen.axes[1 - over] as string];
  const count = doc.steps[axis]?.length ?? 0;
  const side = (name: string, line: number) => {
    const found = chosen.name === doc.main ? beside(doc, name) : null;
    return found && pickLine(found, chosen.shape, over, line, count);
  };
  const lines = (doc.labels[other] ?? []).map((name, i): Line => ({ name, y: pickLine(values, chosen.shape, over, i, count), low: side("low", i), high: side("high", i), control: other === "draw" || /random|control/.test(name) }));
  return <Curve x={doc.steps[axis] as number[]} lines={lines.slice(0, 24)} axis={words(axis)} unit={chosen.unit} label={words(chosen.name)} />;
}

function pickLine(values: Values, shape: number[], over: number, line: number, count: number): number[] {
  return Array.from({ length: count }, (_, step) => values[over === 1 ? placeOf(shape, [line, step]) : placeOf(shape, [step, line])] as number);
}

function TooLarge() {
  return <p class="note">These numbers are too many to be in this file; open the saved folder with patchbay ui.</p>;
}

// --- maps -----------------------------------------------------------------------------------------

function Map({ doc, chosen, slices }: { doc: ResultDoc; chosen: Variable; slices: Slices | undefined }) {
  const leading = chosen.axes.slice(0, -2);
  const [fixed, setFixed] = useState<number[]>(leading.map(() => 0));
  const [row, column] = chosen.axes.slice(-2) as [string, string];
  const { values, failed } = useSlice(chosen, leading.length === fixed.length ? fixed : leading.map(() => 0), slices);
  const main = chosen.name === doc.main;
  const told = useMemo(() => toldBeside(doc, chosen), [doc, chosen]);
  const marked = useMemo(() => marks(doc, chosen), [doc, chosen]);
  useEffect(() => setFixed(leading.map(() => 0)), [chosen.name]);
  const labels = (axis: string) => doc.labels[axis] ?? [];
  return (
    <>
      {leading.length > 0 && (
        <div class="choose">
          {leading.map((axis, i) => (
            <label class="pick">
              <span>{words(axis)}</span>
              <select value={String(fixed[i])} onChange={(event) => setFixed(fixed.map((step, j) => (j === i ? Number(event.currentTarget.value) : step)))}>
                {labels(axis).map((label, step) => <option value={String(step)}>{label}</option>)}
              </select>
            </label>
          ))}
        </div>
      )}
      {failed ? <Failed message={failed} /> : values ? (
        <MapOf doc={doc} chosen={chosen} values={values} row={row} column={column} names={main ? doc.names : null} told={leading.length ? undefined : told} marked={main ? marked : undefined} />
      ) : <div class="waiting" aria-busy="true">Reading {words(chosen.name)} …</div>}
    </>
  );
}

function MapOf(props: { doc: ResultDoc; chosen: Variable; values: Values; row: string; column: string; names: string[] | null; told: ((place: number) => string) | undefined; marked: Set<number> | undefined }) {
  const { doc, chosen, values, row, column } = props;
  const pattern = row === "query" && column === "key";
  const columns = doc.labels[column] ?? [];
  const [query, setQuery] = useState(Math.max(0, (doc.labels[row]?.length ?? 1) - 1));
  const bounds: [number, number] | undefined = chosen.axes.length > 2 && chosen.low !== null && chosen.high !== null ? [chosen.low, chosen.high] : undefined;
  return (
    <>
      {pattern && columns.length <= 256 && (
        <div class="attended">
          <p class="note">What the chosen token attends to; choose another one.</p>
          <Tokens tokens={columns} values={values.subarray(query * columns.length, (query + 1) * columns.length)} unit={chosen.unit} label="Attention from the chosen token" chosen={query} onPick={setQuery} />
        </div>
      )}
      <Heat
        values={values}
        rows={doc.labels[row] ?? []}
        columns={columns}
        axes={[words(row), words(column)]}
        unit={chosen.unit}
        label={`${words(chosen.name)} in ${chosen.unit}`}
        upward={row === "layer"}
        square={pattern}
        names={props.names}
        {...(props.marked ? { marked: props.marked } : {})}
        {...(bounds ? { range: bounds } : {})}
        {...(props.told ? { told: props.told } : {})}
        {...(pattern ? { onPick: (r: number) => setQuery(r) } : {})}
      />
    </>
  );
}

function useSlice(chosen: Variable, fixed: number[], slices: Slices | undefined): { values: Values | null; failed: string } {
  const whole = valuesOf(chosen);
  const [got, setGot] = useState<{ key: string; values: Values | null; failed: string }>({ key: "", values: null, failed: "" });
  const key = `${chosen.name}:${fixed.join()}`;
  useEffect(() => {
    if (whole || got.key === key) return;
    let alive = true;
    if (!slices) setGot({ key, values: null, failed: "These numbers are too many to be in this file; open the saved folder with patchbay ui." });
    else slices(chosen, fixed).then((values) => alive && setGot({ key, values, failed: "" }), (error: Error) => alive && setGot({ key, values: null, failed: error.message }));
    return () => {
      alive = false;
    };
  }, [key, whole]);
  if (!whole) return got.key === key ? got : { values: null, failed: "" };
  const size = chosen.shape.slice(-2).reduce((a, b) => a * b, 1);
  const at = placeOf(chosen.shape.slice(0, -2), fixed);
  return { values: whole.length === size ? whole : whole.subarray(at * size, (at + 1) * size), failed: "" };
}

/** Interval, p and control of a cell in words, where the Result has them on the same axes. */
function toldBeside(doc: ResultDoc, chosen: Variable): ((place: number) => string) | undefined {
  if (chosen.name !== doc.main) return undefined;
  const same = doc.variables.filter((one) => one !== chosen && one.axes.join() === chosen.axes.join() && one.data !== null);
  if (!same.length) return undefined;
  const [low, high] = ["low", "high"].map((name) => same.find((one) => one.name === name));
  return (place) => {
    const said = low && high ? [`95 % ${number(valuesOf(low)?.[place])} to ${number(valuesOf(high)?.[place])}`] : [];
    for (const one of same.filter((other) => other !== low && other !== high && other.unit !== "token id").slice(0, 4)) said.push(`${words(one.name)} ${number(valuesOf(one)?.[place])}`);
    return said.join(" · ");
  };
}

function marks(doc: ResultDoc, chosen: Variable): Set<number> {
  const found = new Set<number>();
  if (!doc.ranked || chosen.axes.length !== 2) return found;
  const [layers, indices] = chosen.axes.map((axis) => doc.steps[axis] ?? []) as [(string | number)[], (string | number)[]];
  for (const part of doc.highlights) {
    const parsed = /^L(\d+)\.[A-Z](\d+)$/.exec(part);
    const at = parsed ? [layers.indexOf(Number(parsed[1])), indices.indexOf(Number(parsed[2]))] : [-1, -1];
    if ((at[0] as number) >= 0 && (at[1] as number) >= 0) found.add(placeOf(chosen.shape, at as number[]));
  }
  return found;
}

// --- ranked parts ---------------------------------------------------------------------------------

function Ranked({ doc, link }: { doc: ResultDoc; link: ShowProps["link"] }) {
  const main = variable(doc, doc.main);
  const get = (row: Row, name: string) => {
    const value = row[name];
    return typeof value === "number" && variable(doc, name)?.unit === main?.unit ? value : null;
  };
  const strongest = doc.rows.slice(0, BARS).sort((a, b) => Number(b["value"]) - Number(a["value"]));
  const bars = strongest.map((row): Bar => ({
    name: String(row["part"]), value: Number(row["value"]), low: get(row, "low"), high: get(row, "high"), nullMean: get(row, "null_mean"), nullLow: get(row, "null_low"), nullHigh: get(row, "null_high"),
    aside: typeof row["p"] === "number" ? `p ${number(row["p"])}` : "", strong: doc.highlights.includes(String(row["part"])), link: link?.(String(row["part"])),
  }));
  return (
    <>
      <Bars bars={bars} unit={main?.unit ?? ""} label={`Parts by ${words(doc.main)}`} />
      {doc.measured > bars.length && <p class="note">The {bars.length} largest of {doc.measured.toLocaleString("en")} parts, either sign.</p>}
    </>
  );
}

function partLink(link: ShowProps["link"]): (row: Row) => string | undefined {
  return (row) => (typeof row["part"] === "string" ? link?.(row["part"]) : undefined);
}

// --- what else a Result holds ---------------------------------------------------------------------

function TokenStrip({ doc }: { doc: ResultDoc }) {
  const found = doc.tables["tokens"]?.rows ?? [];
  const position = doc.labels["position"];
  const scores = doc.variables.filter((one) => one.axes.join() === "position" && one.data !== null && one.name !== "token_id");
  const [name, setName] = useState("");
  const chosen = scores.find((one) => one.name === name) ?? scores[0];
  if (!found.length || !position || !chosen || doc.main === chosen.name) return null;
  return (
    <Panel title="Tokens" aside={scores.length > 1 && (
      <label class="pick"><span>Shown</span>
        <select value={chosen.name} onChange={(event) => setName(event.currentTarget.value)}>{scores.map((one) => <option value={one.name}>{words(one.name)}</option>)}</select>
      </label>)}>
      <Tokens tokens={(doc.steps["position"] ?? []).map((step) => token(String(step)))} values={valuesOf(chosen) ?? undefined} unit={chosen.unit} label={words(chosen.name)} legend />
    </Panel>
  );
}

/** The token of a label such as `3 ' of'`. */
function token(label: string): string {
  return /^-?\d+ (['"])(.*)\1$/s.exec(label)?.[2] ?? label;
}

function Singles({ doc }: { doc: ResultDoc }) {
  const alone = doc.variables.filter((one) => one.axes.length === 0);
  const value = (name: string) => {
    const found = alone.find((one) => one.name === name);
    return found ? (valuesOf(found)?.[0] ?? NaN) : NaN;
  };
  const ends = new Set(alone.map((one) => one.name).filter((name) => /_(low|high)$/.test(name) && !Number.isNaN(value(name.replace(/_(low|high)$/, "")))));
  if (doc.variables[0]?.axes.length === 0) ["low", "high"].forEach((name) => ends.add(name));
  const shown = alone.filter((one) => !ends.has(one.name) && !Number.isNaN(value(one.name)));
  if (!shown.length) return null;
  return (
    <Panel title={doc.variables[0]?.axes.length === 0 ? "Measured" : "Single numbers"}>
      <dl class="tiles">
        {shown.map((one) => {
          const stem = one.name === doc.main && !Number.isNaN(value("low")) ? "" : `${one.name}_`;
          const [low, high] = [value(`${stem}low`), value(`${stem}high`)];
          return (
            <div class={one.name === doc.main ? "tile main" : "tile"}>
              <dt>{words(one.name)}</dt>
              <dd>
                <b class="num">{number(value(one.name))}</b> <span>{one.unit}</span>
                {!Number.isNaN(low) && <small class="num">95 % {number(low)} to {number(high)}</small>}
              </dd>
            </div>
          );
        })}
      </dl>
    </Panel>
  );
}

function Tables({ doc, link }: { doc: ResultDoc; link: ShowProps["link"] }) {
  const shown = new Set(doc.sections.map((section) => section.name));
  const others = Object.entries(doc.tables).filter(([name]) => !shown.has(name) && name !== "cells" && name !== "tokens" && name !== "names");
  if (!others.length && !doc.rows.length) return null;
  return (
    <Panel title="Numbers">
      {doc.rows.length > 0 && <Table rows={doc.rows} n={doc.measured} title="parts, largest first" link={partLink(link)} />}
      {others.map(([name, table]) => <Table rows={table.rows} n={table.n} title={words(name)} />)}
    </Panel>
  );
}

function Whence({ provenance, python }: { provenance: [string, string][]; python: string }) {
  return (
    <Panel title="Where the numbers came from" class="whence">
      {python && (
        <div class="call">
          <pre tabIndex={0} aria-label="Python that makes it again"><code>{python}</code></pre>
          <Copy text={() => python} label="Copy Python" />
        </div>
      )}
      {provenance.length ? (
        <details>
          <summary>{provenance.length} facts of the record</summary>
          <dl class="facts">{provenance.map(([name, value]) => <><dt>{name}</dt><dd>{value}</dd></>)}</dl>
        </details>
      ) : <p class="note">Made by hand: no record.</p>}
    </Panel>
  );
}

export function titleOf(doc: Doc): string {
  return doc.method ? methodName(doc.method) : doc.kind === "knob" ? doc.name : "Result";
}
