// What Python sends: a Result as a document, its arrays decoded once, and how numbers and labels read.

export type Cell = string | number | boolean | null | Cell[] | { [key: string]: Cell };
export type Row = Record<string, Cell>;
export type Values = Float32Array | Float64Array;

export interface Variable {
  name: string;
  axes: string[];
  unit: string;
  shape: number[];
  type: "float32" | "float64";
  data: string | null;
  low: number | null;
  high: number | null;
}

export interface Listed {
  rows: Row[];
  n: number;
}

export interface Cable {
  from: string;
  to: string;
  score: number;
  p: number | null;
}

export interface ResultDoc {
  kind: "result";
  name: string;
  method: string;
  asked: string;
  title: string;
  origin: string;
  main: string;
  variables: Variable[];
  steps: Record<string, (string | number)[]>;
  labels: Record<string, string[]>;
  ranked: boolean;
  measured: number;
  rows: Row[];
  names: string[] | null;
  cables: { lines: Cable[]; n: number; smallest: number | null } | null;
  tables: Record<string, Listed>;
  sections: (Listed & { name: string; notes: string[] })[];
  notes: string[];
  highlights: string[];
  provenance: [string, string][];
  python: string;
}

export interface KnobDoc {
  kind: "knob";
  name: string;
  method: string;
  strength: number;
  neutral: number;
  edits: string[];
  n_edits: number;
  evidence: Record<string, ResultDoc>;
  provenance: [string, string][];
  origin: string;
}

export type Doc = ResultDoc | KnobDoc;

/** How a view gets the last two axes of an array that did not come with its document. */
export type Slices = (variable: Variable, fixed: number[]) => Promise<Values>;

const decoded = new WeakMap<Variable, Values>();

export function valuesOf(variable: Variable): Values | null {
  const known = decoded.get(variable);
  if (known || variable.data === null) return known ?? null;
  const made = floats(Uint8Array.from(atob(variable.data), (c) => c.charCodeAt(0)).buffer, variable.type);
  decoded.set(variable, made);
  return made;
}

export function floats(buffer: ArrayBuffer, type: string): Values {
  return type === "float32" ? new Float32Array(buffer) : new Float64Array(buffer);
}

export function variable(doc: ResultDoc, name: string): Variable | undefined {
  return doc.variables.find((one) => one.name === name);
}

/** A variable that may be drawn beside the main one: the same axes and the same unit. */
export function beside(doc: ResultDoc, name: string): Values | null {
  const main = variable(doc, doc.main);
  const found = variable(doc, name);
  if (!main || !found || found.unit !== main.unit || found.axes.join() !== main.axes.join()) return null;
  return valuesOf(found);
}

/** Four figures of a number; what has no value is a dash. */
export function number(value: unknown): string {
  if (typeof value !== "number") return value === null || value === undefined ? "–" : String(value);
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "–" : value > 0 ? "∞" : "−∞";
  if (Number.isInteger(value) && Math.abs(value) < 1e7) return minus(String(value));
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e5) return minus(value.toExponential(2).replace("e+", "e"));
  const decimals = Math.max(0, 3 - (size >= 1 ? Math.floor(Math.log10(size)) : 0));
  return minus(value.toFixed(decimals));
}

export function short(value: number): string {
  if (!Number.isFinite(value)) return "";
  const size = Math.abs(value);
  if (size && (size < 1e-2 || size >= 1e4)) return minus(value.toExponential(0).replace("e+", "e"));
  return minus(value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : 2));
}

/** Numbers of an axis: as many decimals as their steps need. */
export function marked(marks: number[]): string[] {
  const step = marks.length > 1 ? Math.abs((marks[1] as number) - (marks[0] as number)) : Math.abs(marks[0] ?? 1) || 1;
  if (step < 1e-4 || step >= 1e5) return marks.map((mark) => (mark ? minus(mark.toExponential(1).replace("e+", "e")) : "0"));
  const decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  return marks.map((mark) => minus(mark.toFixed(decimals)));
}

function minus(text: string): string {
  return text.replace(/^-/, Number(text) === 0 ? "" : "−").replace("e-", "e−");
}

export function words(name: string): string {
  return name.replace(/^stories\./, "").replace(/(?<![a-z])n_parts/, "number of parts").replace(/_/g, " ");
}

/** Methods that their papers write otherwise than with one capital in front; figures have the same (patchbay/draw/style.py). */
const WRITTEN: Record<string, string> = {
  acdc: "ACDC",
  atp_star: "AtP*",
  das: "DAS",
  dexperts: "DExperts",
  dola: "DoLa",
  knn: "kNN-LM",
  knn_parts: "kNN-LM by parts",
  longheads: "LongHeads",
};

export function methodName(name: string): string {
  const last = name.slice(name.lastIndexOf(".") + 1);
  const said = words(last);
  return WRITTEN[last] ?? said.charAt(0).toUpperCase() + said.slice(1);
}

/** Labels with their spaces shown, as a token is told from another. */
export function visible(text: string): string {
  const line = text.replace(/\n/g, "\\n").replace(/\t/g, "\\t");
  return line === line.trim() ? line : line.replace(/ /g, "␣");
}

export function cellText(cell: Cell | undefined): string {
  if (cell === null || cell === undefined) return "";
  if (Array.isArray(cell)) return cell.map(cellText).join(", ");
  if (typeof cell === "object") return JSON.stringify(cell);
  return typeof cell === "number" ? number(cell) : typeof cell === "boolean" ? (cell ? "yes" : "no") : cell;
}

/** Flat place of a cell from its steps. */
export function placeOf(shape: number[], steps: number[]): number {
  return steps.reduce((at, step, i) => at * (shape[i] ?? 1) + step, 0);
}

export function extent(values: ArrayLike<number>): [number, number] {
  let low = Infinity;
  let high = -Infinity;
  for (let i = 0; i < values.length; i++) {
    const value = values[i] as number;
    if (value < low && Number.isFinite(value)) low = value;
    if (value > high && Number.isFinite(value)) high = value;
  }
  return low > high ? [0, 1] : [low, high];
}
