// What the page asks of its server, and the one stream of state that all tabs share.

import { useEffect, useState } from "preact/hooks";
import { floats, type Doc, type ResultDoc, type Slices, type Variable } from "./data";

export interface Run {
  id: string;
  room: string;
  method: string;
  name: string;
  state: "queued" | "running" | "stopping" | "done" | "failed" | "cancelled";
  done: number;
  total: number;
  estimate: string;
  seconds: number;
  message: string;
  command: string;
  given: Record<string, unknown>;
  result: string | null;
  drawn: number; // states of its sweep's map so far
}

/** What a sweep has found so far; null where a cell has not run. */
export interface Partial {
  rows: string[];
  columns: string[];
  axes: [string, string];
  unit: string;
  values: (number | null)[][];
}

export interface ModelState {
  source: string | null;
  state: "none" | "loading" | "ready" | "failed";
  message: string;
}

export interface State {
  model: ModelState;
  runs: Run[];
  looking: number;
  results: number; // counts changes of the folder
}

export interface Method {
  name: string;
  doc: string;
}

export interface About {
  version: string;
  folder: string;
  rooms: { name: string; doc: string; methods: Method[] }[];
  tasks: { name: string; doc: string; options: string }[];
}

export interface Field {
  name: string;
  flag: string;
  off: string;
  word: string;
  kind: "flag" | "choice" | "integer" | "number" | "text";
  metavar: string;
  choices: string[];
  required: boolean;
  initial: string;
  many: boolean;
  group: "acts on" | "options";
}

export interface Form {
  room: string;
  name: string;
  head: string;
  help: string;
  fields: Field[];
}

export interface Entry {
  name: string;
  kind: "result" | "knob" | "damaged";
  method: string;
  model: string;
  about: string;
  date: string;
  message: string;
}

export interface Prompt {
  tokens: string[];
  next: ResultDoc;
  lens: ResultDoc | null;
  lens_message: string;
  n_layers: number;
  heads: number[];
}

export interface Next {
  token: string;
  before: number;
  after: number;
}

export interface Paper {
  name: string;
  key: string | null;
  arxiv: string | null;
  title: string;
  marked_title: string | null;
  snippet: string;
  year: number | null;
  published: string | null;
  likes: number | null;
  comments: number | null;
  authors: string[];
  n_authors: number | null;
  organization: string;
  code: string;
  address: string;
  kind: string;
  does: string;
  headline: string;
  methods: string[];
  state: string;
  model: string;
  marked: boolean;
  heat: number | null;
  verdict?: string; // of the last check of its claim
}

export interface Papers {
  papers: Paper[];
  view: string;
  more: number;
  of: number;
  dated: number;
  kept: string | null;
  kinds: string[];
  first: string | null;
  last: string | null;
  before: string | null;
  after: string | null;
}

export interface WholePaper extends Paper {
  abstract: string;
  claim: string;
  measured: string;
  command: string;
  verdicts: { model: string; weights: string; verdict: string; told: string; at: string }[];
  likes_by_day: { day: string; likes: number | null; comments: number | null }[];
  similar: Paper[];
}

export class Refused extends Error {}

async function answered(response: Response): Promise<Response> {
  if (response.ok) return response;
  let message = `${response.status} ${response.statusText}`;
  try {
    message = String((await response.json()).error.message);
  } catch {
    // an answer of no JSON has no better words
  }
  throw new Refused(message);
}

async function ask(path: string, init?: RequestInit): Promise<Response> {
  let response: Response;
  try {
    response = await fetch(path, { credentials: "same-origin", ...init });
  } catch (error) {
    if ((error as Error).name === "AbortError") throw error;
    throw new Refused("The server does not answer. Is it still running?");
  }
  return answered(response);
}

export async function get<T>(path: string, signal?: AbortSignal): Promise<T> {
  return (await ask(path, signal ? { signal } : {})).json() as Promise<T>;
}

export async function post<T>(path: string, body: unknown, signal?: AbortSignal): Promise<T> {
  const init: RequestInit = { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
  return (await ask(path, signal ? { ...init, signal } : init)).json() as Promise<T>;
}

/** What is told piece by piece, and then the answer. A new word to the same question stops the one before it, by `signal`. */
export async function listen<T, P>(body: unknown, heard: (piece: P) => void, signal: AbortSignal): Promise<T> {
  const init: RequestInit = { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal };
  const response = await ask("/api/look", init);
  if (!response.headers.get("content-type")?.includes("ndjson") || !response.body) return (await response.json()) as T;
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  for (;;) {
    const { done, value } = await reader.read();
    const lines = (left + (value ?? "")).split("\n");
    left = lines.pop() ?? "";
    for (const line of lines) {
      const said = JSON.parse(line) as { piece?: P; answer?: T; error?: { message: string } };
      if (said.error) throw new Refused(said.error.message);
      if (said.answer !== undefined) return said.answer;
      if (said.piece !== undefined) heard(said.piece);
    }
    if (done) throw new Refused("The server stopped before it had answered.");
  }
}

/** What the model says of a question that runs it; null asks nothing. Pieces come to `heard`. */
export function useLook<T, P = never>(asked: Record<string, unknown> | null, heard?: (piece: P) => void): { got: T | null; failed: string; busy: boolean } {
  const key = asked ? JSON.stringify(asked) : "";
  const [held, hold] = useState<{ key: string; got: T | null; failed: string }>({ key: "", got: null, failed: "" });
  useEffect(() => {
    if (!asked) return;
    const stop = new AbortController();
    const told = (piece: P) => !stop.signal.aborted && heard?.(piece);
    listen<T, P>(asked, told, stop.signal).then(
      (got) => hold({ key, got, failed: "" }),
      (error: Error) => !stop.signal.aborted && hold({ key, got: null, failed: error.message }),
    );
    return () => stop.abort();
  }, [key]);
  return held.key === key ? { ...held, busy: false } : { got: null, failed: "", busy: Boolean(asked) };
}

export function address(name: string): string {
  return name.split("/").map(encodeURIComponent).join("/");
}

export function slicesOf(name: string): Slices {
  return async (variable: Variable, fixed: number[]) => {
    const query = new URLSearchParams({ name, variable: variable.name, fixed: fixed.join(",") });
    return floats(await (await ask(`/api/slice?${query}`)).arrayBuffer(), variable.type);
  };
}

/** What an address gives, with its state; asked again when the address or `again` changes. */
export function useGet<T>(path: string | null, again: unknown = 0): { got: T | null; failed: string; busy: boolean } {
  const [held, hold] = useState<{ path: string | null; got: T | null; failed: string; busy: boolean }>({ path: null, got: null, failed: "", busy: true });
  useEffect(() => {
    if (path === null) return;
    const stop = new AbortController();
    hold((before) => ({ path, got: before.path === path ? before.got : null, failed: "", busy: true }));
    get<T>(path, stop.signal).then(
      (got) => hold({ path, got, failed: "", busy: false }),
      (error: Error) => error.name !== "AbortError" && hold({ path, got: null, failed: error.message, busy: false }),
    );
    return () => stop.abort();
  }, [path, again]);
  return held.path === path ? held : { got: null, failed: "", busy: true };
}

/** The state of the server as it changes; null before the first word, and `lost` while nothing is heard. */
export function useState_(): { state: State | null; lost: boolean } {
  const [state, setState] = useState<State | null>(null);
  const [lost, setLost] = useState(false);
  useEffect(() => {
    let source: EventSource | null = null;
    let timer = 0;
    const open = () => {
      source = new EventSource("/api/events");
      source.onmessage = (event) => {
        setLost(false);
        setState(JSON.parse(event.data as string) as State);
      };
      source.onerror = () => {
        setLost(true);
        if (source?.readyState === EventSource.CLOSED) timer = window.setTimeout(open, 2000);
      };
    };
    open();
    return () => {
      clearTimeout(timer);
      source?.close();
    };
  }, []);
  return { state, lost };
}

export type { Doc };
