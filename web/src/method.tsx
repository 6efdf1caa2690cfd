// Methods as forms made from their signatures: the words of --help, their types, their defaults.

import { useEffect, useState } from "preact/hooks";
import { go } from "./app";
import { post, useGet, type About, type Field, type Form, type Run, type State } from "./api";
import { methodName } from "./data";
import { Failed, Said } from "./parts";
import { PageHead } from "./results";
import { RunCard } from "./runs";

export function RoomPage({ room }: { room: About["rooms"][number] }) {
  const [word, setWord] = useState("");
  const asked = word.toLowerCase().split(/\s+/).filter(Boolean);
  const shown = room.methods.filter((one) => asked.every((piece) => `${one.name.replace(/_/g, " ")} ${one.doc}`.toLowerCase().includes(piece)));
  return (
    <>
      <PageHead title={methodName(room.name)} lead={room.doc} />
      <label class="search"><span class="hidden">Search methods</span>
        <input type="search" placeholder={`Search ${room.methods.length} methods`} value={word} onInput={(event) => setWord(event.currentTarget.value)} />
      </label>
      <ul class="methods">
        {shown.map((one) => (
          <li><a href={`#/${room.name}/${one.name}`}><b>{methodName(one.name)}</b><span>{one.doc.replace(/^[^:]{0,60}: /, (start) => (start.length < 50 ? "" : start))}</span></a></li>
        ))}
      </ul>
    </>
  );
}

type Given = Record<string, string | boolean>;

export function MethodPage({ room, name, state, about, query }: { room: string; name: string; state: State | null; about: About; query: URLSearchParams }) {
  const { got, failed } = useGet<Form>(`/api/method?room=${room}&name=${name}`);
  const key = `patchbay-form-${room}-${name}`;
  const [given, setGiven] = useState<Given>({});
  const [target, setTarget] = useState("");
  const [refused, setRefused] = useState("");
  const [asking, setAsking] = useState(false);
  const [id, setId] = useState<string | null>(null);
  useEffect(() => {
    const earlier = query.get("given") ?? sessionStorage.getItem(key);
    setGiven(earlier ? (JSON.parse(earlier) as Given) : {});
    setTarget(query.get("name") ?? "");
    setRefused("");
    setId(null);
  }, [room, name, query.toString()]);
  const change = (field: string, value: string | boolean) => {
    const next = { ...given, [field]: value };
    setGiven(next);
    sessionStorage.setItem(key, JSON.stringify(next));
  };
  const submit = async (event: Event) => {
    event.preventDefault();
    setRefused("");
    setAsking(true);
    try {
      setId((await post<{ id: string }>("/api/runs", { room, method: name, given, name: target })).id);
    } catch (error) {
      setRefused((error as Error).message);
    }
    setAsking(false);
  };
  if (failed) return <Failed message={failed}><p><a href={`#/${room}`}>All methods of {room}</a></p></Failed>;
  if (!got) return <div class="waiting" aria-busy="true">Reading {methodName(name)} …</div>;
  const run = state?.runs.find((one) => one.id === id) ?? latest(state, room, name);
  const ready = state?.model.state === "ready" || state?.model.state === "loading";
  const acted = got.fields.filter((field) => field.group === "acts on");
  const others = got.fields.filter((field) => field.group !== "acts on");
  return (
    <>
      <PageHead title={methodName(name)} lead={got.head.replace(/`/g, "")} back={{ to: `#/${room}`, text: methodName(room) }} />
      <div class="form-page">
        <form class="panel form" onSubmit={submit}>
          {acted.map((field) => <Input field={field} value={given[field.name]} tasks={about.tasks} change={change} />)}
          {others.length > 0 && (
            <details open={others.some((field) => field.required || field.name in given)}>
              <summary>{others.length} option{others.length === 1 ? "" : "s"}</summary>
              {others.map((field) => <Input field={field} value={given[field.name]} tasks={about.tasks} change={change} />)}
            </details>
          )}
          <div class="field">
            <label for="target">Save as</label>
            <input id="target" type="text" value={target} placeholder={name} onInput={(event) => setTarget(event.currentTarget.value)} aria-describedby="target-word" />
            <p class="word" id="target-word">A folder of the results; without, the method's name and the next free number.</p>
          </div>
          {refused && <Failed message={refused} />}
          <div class="form-foot">
            <button type="submit" class="primary" disabled={asking || !ready}>Run</button>
            {!ready && <span class="note">{state?.model.state === "failed" ? state.model.message : "Start patchbay ui with a MODEL to run methods."}</span>}
          </div>
        </form>
        <div class="form-side">
          {run && <RunCard run={run} />}
          <details class="panel help" open={!run}>
            <summary>What it measures</summary>
            {got.help.split("\n\n").map((paragraph) => (paragraph.startsWith("    ") ? <pre tabIndex={0}>{paragraph.replace(/^ {4}/gm, "")}</pre> : <p><Said text={paragraph} /></p>))}
          </details>
        </div>
      </div>
    </>
  );
}

function latest(state: State | null, room: string, name: string): Run | undefined {
  return [...(state?.runs ?? [])].reverse().find((run) => run.room === room && run.method === name);
}

function Input({ field, value, tasks, change }: { field: Field; value: string | boolean | undefined; tasks: About["tasks"]; change: (name: string, value: string | boolean) => void }) {
  const id = `field-${field.name}`;
  const word = `${id}-word`;
  const text = typeof value === "string" ? value : "";
  const set = (event: { currentTarget: { value: string } }) => change(field.name, event.currentTarget.value);
  const list = field.name === "task" ? "tasks" : undefined;
  if (field.kind === "flag") {
    return (
      <div class="field flag">
        <label><input type="checkbox" checked={value === undefined ? field.initial === "true" : Boolean(value)} onChange={(event) => change(field.name, event.currentTarget.checked)} aria-describedby={word} /> {field.flag}</label>
        <p class="word" id={word}><Said text={field.word} /></p>
      </div>
    );
  }
  return (
    <div class="field">
      <label for={id}>{field.flag}{field.required && <span class="needed"> needed</span>}</label>
      {field.kind === "choice" ? (
        <select id={id} value={text || field.initial} onChange={set} aria-describedby={word} required={field.required}>
          {!field.initial && <option value="">{field.required ? "choose" : "not given"}</option>}
          {field.choices.map((choice) => <option value={choice}>{choice}</option>)}
        </select>
      ) : (
        <input
          id={id}
          type="text"
          inputMode={field.kind === "integer" ? "numeric" : field.kind === "number" ? "decimal" : "text"}
          value={text}
          placeholder={field.initial || (field.kind === "integer" ? "a whole number" : field.metavar)}
          required={field.required}
          list={list}
          onInput={set}
          aria-describedby={word}
          autocomplete="off"
          spellcheck={false}
        />
      )}
      {list && <datalist id="tasks">{tasks.map((task) => <option value={task.name}>{task.doc}</option>)}</datalist>}
      <p class="word" id={word}><Said text={field.word} /></p>
    </div>
  );
}

export { go };
