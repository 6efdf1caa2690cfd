// What runs, waits, and has ended since the server started: how far it is, and how it is stopped.

import { useMemo } from "preact/hooks";
import { address, post, useGet, type Partial, type Run } from "./api";
import { methodName } from "./data";
import { Heat } from "./heat";
import { Copy, Empty } from "./parts";
import { PageHead } from "./results";

const SAID: Record<Run["state"], string> = { queued: "waits", running: "running", stopping: "stopping", done: "done", failed: "failed", cancelled: "cancelled" };

export function RunsPage({ runs }: { runs: Run[] | null }) {
  return (
    <>
      <PageHead title="Runs" lead="One at a time, in their order. What a cancelled sweep had finished is kept: the same call goes on from there." />
      {runs && !runs.length && <Empty title="Nothing has run since the server started"><p>Choose a method on <a href="#/find">Find</a> or <a href="#/prove">Prove</a>.</p></Empty>}
      <ul class="runs">{[...(runs ?? [])].reverse().map((run) => <li key={run.id}><RunCard run={run} /></li>)}</ul>
    </>
  );
}

export function RunCard({ run }: { run: Run }) {
  const again = new URLSearchParams({ given: JSON.stringify(run.given), name: run.name });
  return (
    <article class={`run ${run.state}`}>
      <div class="run-head">
        <b>{methodName(run.method)}</b>
        <span class={`state ${run.state}`}>{SAID[run.state]}</span>
        <span class="num run-time">{run.seconds > 0 ? seconds(run.seconds) : ""}</span>
      </div>
      {["running", "stopping"].includes(run.state) && <Progress run={run} />}
      {run.message && <p class={run.state === "failed" ? "failed" : "note"} role={run.state === "failed" ? "alert" : undefined}>{run.message}</p>}
      {run.drawn > 0 && run.state !== "done" && <SoFar run={run} />}
      <details>
        <summary>The call</summary>
        <div class="call"><pre tabIndex={0}><code>{run.command}</code></pre><Copy text={() => run.command} /></div>
      </details>
      <div class="run-foot">
        {run.result && <a class="button" href={`#/results/${address(run.result)}`}>Open {run.result}</a>}
        {["running", "queued"].includes(run.state) && <button type="button" onClick={() => void post(`/api/runs/${run.id}/cancel`, {}).catch(() => undefined)}>Cancel</button>}
        {["failed", "cancelled"].includes(run.state) && <a class="button" href={`#/${run.room}/${run.method}?${again}`}>{run.state === "failed" ? "Change and run again" : "Go on"}</a>}
      </div>
    </article>
  );
}

export function RunLine({ run, waiting }: { run: Run; waiting: number }) {
  return (
    <a class="run-line" href="#/runs">
      <span>{methodName(run.method)}: {SAID[run.state]}{run.total ? `, ${run.done.toLocaleString("en")} of ${run.total.toLocaleString("en")}` : ""}{waiting ? `; ${waiting} more wait` : ""}</span>
      <Bar run={run} />
    </a>
  );
}

function Progress({ run }: { run: Run }) {
  const left = run.done > 0 && run.total > run.done ? (run.seconds * (run.total - run.done)) / run.done : null;
  return (
    <div class="progress">
      <Bar run={run} />
      <span class="note num">
        {run.total ? `${run.done.toLocaleString("en")} of ${run.total.toLocaleString("en")} cells` : "working"}
        {left !== null && left > 1 ? `, about ${seconds(left)} left` : ""}
        {run.estimate ? ` · ${run.estimate}` : ""}
      </span>
    </div>
  );
}

/** The map of the sweep at hand, filling as its batches end; of a run that was stopped, what it had found. */
function SoFar({ run }: { run: Run }) {
  const { got } = useGet<Partial | null>(`/api/partial?id=${run.id}`, run.drawn);
  const values = useMemo(() => Float64Array.from((got?.values ?? []).flat(), (value) => value ?? NaN), [got]);
  if (!got) return null;
  const ended = values.reduce((n, value) => n + (Number.isNaN(value) ? 0 : 1), 0);
  return (
    <div class="so-far">
      <p class="note num">{ended === values.length ? "the sweep, whole" : `${ended.toLocaleString("en")} of ${values.length.toLocaleString("en")} cells of the map so far`}: mean effect, {got.unit}</p>
      <Heat values={values} rows={got.rows} columns={got.columns} axes={got.axes} unit={got.unit} label={`What the sweep of ${methodName(run.method)} has found so far`} upward />
    </div>
  );
}

function Bar({ run }: { run: Run }) {
  return run.total ? (
    <progress value={run.done} max={run.total} aria-label={`${methodName(run.method)}: ${Math.round((100 * run.done) / run.total)} %`} />
  ) : (
    <progress aria-label={`${methodName(run.method)}: working`} />
  );
}

export function seconds(value: number): string {
  return value < 60 ? `${value < 10 ? value.toFixed(1) : Math.round(value)} s` : `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
}
