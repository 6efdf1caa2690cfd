// The page: what is at hand on the left, one view on the right. An address names what is shown.

import { useEffect, useState } from "preact/hooks";
import { useGet, useState_, type About, type State } from "./api";
import { FeaturesPage } from "./features";
import { KnobsPage } from "./knobs";
import { MethodPage, RoomPage } from "./method";
import { ModelPage } from "./model";
import { PaperPage, PapersPage } from "./papers";
import { Failed } from "./parts";
import { PromptPage } from "./prompt";
import { ComparePage, PageHead, ResultPage, ResultsPage } from "./results";
import { RunLine, RunsPage } from "./runs";

export interface Place {
  path: string[];
  query: URLSearchParams;
}

function placeNow(): Place {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  return { path: (path ?? "").split("/").filter(Boolean).map(decodeURIComponent), query: new URLSearchParams(query ?? "") };
}

export function go(path: string): void {
  location.hash = `#/${path}`;
}

const VERBS: Record<string, string> = { find: "Find", prove: "Prove", turn: "Turn", decode: "Decode", train: "Train", measure: "Measure" };

export function App() {
  const [place, setPlace] = useState(placeNow);
  const { state, lost } = useState_();
  const about = useGet<About>("/api/about");
  useEffect(() => {
    const moved = () => {
      setPlace(placeNow());
      document.getElementById("main")?.scrollIntoView({ block: "start" });
    };
    addEventListener("hashchange", moved);
    return () => removeEventListener("hashchange", moved);
  }, []);
  const at = place.path[0] ?? "papers";
  useEffect(() => {
    document.title = [...place.path.slice(0, 2).reverse().map(decodeURIComponent), "Patchbay"].join(" · ");
  }, [place]);
  const rooms = about.got?.rooms.map((room) => room.name) ?? Object.keys(VERBS);
  const running = state?.runs.filter((run) => ["queued", "running", "stopping"].includes(run.state)) ?? [];
  const link = (to: string, text: string, aside?: string) => (
    <a href={`#/${to}`} aria-current={at === to || (at === "paper" && to === "papers") || (at === "compare" && to === "results") ? "page" : undefined}>
      {text}
      {aside && <span class="badge num">{aside}</span>}
    </a>
  );
  return (
    <div class="shell">
      <a class="skip" href="#main" onClick={(event) => { event.preventDefault(); document.getElementById("main")?.focus(); }}>To the content</a>
      <header class="side">
        <a class="brand" href="#/">
          <Mark /> Patchbay
        </a>
        <nav aria-label="Pages">
          {link("papers", "Papers")}
          {link("prompt", "Prompt")}
          {link("model", "Model")}
          {link("features", "Features")}
          <span class="nav-rule" />
          {rooms.map((room) => link(room, VERBS[room] ?? room))}
          {link("knobs", "Knobs")}
          <span class="nav-rule" />
          {link("results", "Results")}
          {link("runs", "Runs", running.length ? String(running.length) : undefined)}
        </nav>
        <ModelLine state={state} />
        <Theme />
      </header>
      <div class="content">
        {lost && <div class="lost" role="alert">The server has stopped or cannot be reached; what is shown stays. Start it again with <code>patchbay ui</code> and open its new address.</div>}
        {running[0] && at !== "runs" && <RunLine run={running[0]} waiting={running.length - 1} />}
        <main id="main" tabIndex={-1}>
          {about.failed ? <Failed message={about.failed} /> : <View place={place} state={state} about={about.got} />}
        </main>
      </div>
    </div>
  );
}

function View({ place, state, about }: { place: Place; state: State | null; about: About | null }) {
  const [first = "papers", ...rest] = place.path;
  const room = about?.rooms.find((one) => one.name === first);
  if (first === "results") return rest.length ? <ResultPage name={rest.join("/")} changed={state?.results ?? 0} /> : <ResultsPage changed={state?.results ?? 0} folder={about?.folder ?? ""} />;
  if (first === "papers") return <PapersPage query={place.query} />;
  if (first === "paper") return <PaperPage name={rest.join("/")} state={state} />;
  if (first === "compare") return <ComparePage query={place.query} changed={state?.results ?? 0} />;
  if (first === "knobs") return <KnobsPage query={place.query} state={state} />;
  if (first === "features") return <FeaturesPage part={rest.join("/")} query={place.query} state={state} />;
  if (first === "model") return <ModelPage part={rest.join("/")} state={state} />;
  if (first === "prompt") return <PromptPage query={place.query} state={state} />;
  if (first === "runs") return <RunsPage runs={state?.runs ?? null} />;
  if (room && about) return rest[0] ? <MethodPage room={room.name} name={rest[0]} state={state} about={about} query={place.query} /> : <RoomPage room={room} />;
  return about ? <><PageHead title="No such page" /><Failed message={`There is no page ${place.path.join("/")}.`}><p><a href="#/results">To the results</a></p></Failed></> : <div class="waiting" aria-busy="true">Opening …</div>;
}

function ModelLine({ state }: { state: State | null }) {
  const model = state?.model;
  if (!model) return <p class="model-line"><span class="lamp" /> …</p>;
  const said = { none: "no model", loading: "loading", ready: "ready", failed: "did not load" }[model.state];
  return (
    <p class="model-line" title={model.message}>
      <span class={`lamp ${model.state}`} aria-hidden="true" />
      <b>{model.source ?? "No model"}</b>
      <span>{model.source ? said : "results only"}</span>
    </p>
  );
}

function Theme() {
  const [theme, setTheme] = useState(localStorage.getItem("patchbay-theme") ?? "system");
  useEffect(() => {
    if (theme === "system") delete document.documentElement.dataset["theme"];
    else document.documentElement.dataset["theme"] = theme;
    localStorage.setItem("patchbay-theme", theme);
  }, [theme]);
  return (
    <label class="theme">
      <span>Colours</span>
      <select value={theme} onChange={(event) => setTheme(event.currentTarget.value)}>
        <option value="system">system</option>
        <option value="light">light</option>
        <option value="dark">dark</option>
      </select>
    </label>
  );
}

function Mark() {
  return (
    <svg class="mark" viewBox="0 0 32 32" aria-hidden="true">
      <path d="M9 10 C 9 26, 23 6, 23 22" />
      <circle cx="9" cy="10" r="5" />
      <circle cx="23" cy="22" r="5" />
      <circle class="hole" cx="9" cy="10" r="1.8" />
      <circle class="hole" cx="23" cy="22" r="1.8" />
    </svg>
  );
}
