// The model as a patch bay: its layers as rows, its parts as jacks; and the card of one of them.

import { useGet, type State } from "./api";
import { number, type Row } from "./data";
import { Empty, Failed, Panel } from "./parts";
import { PageHead } from "./results";
import { Table } from "./table";

interface Layer {
  layer: number;
  heads: number;
  groups: number;
  d_head: number | null;
  neurons: number;
  experts: number;
  signals: string[];
}

interface Card {
  source: string;
  family: string;
  parameters: number;
  d_model: number;
  vocab: number;
  max_positions: number | null;
  dtype: string;
  device: string;
  fingerprint: string;
  carried: string[];
  check: { stream: number; logits: number; heads: number; tolerance: number; passed: boolean };
  layers: Layer[];
}

interface PartCard {
  title: string;
  sections: { title: string; rows: Row[] }[];
}

export function ModelPage({ part, state }: { part: string; state: State | null }) {
  const model = state?.model.state;
  const card = useGet<Card>(model === "ready" ? "/api/model" : null);
  if (model === "none") return <><PageHead title="Model" /><Empty title="No model is open"><p>Start <code>patchbay ui MODEL</code>, such as <code>patchbay ui tiny</code>. Results can be read without one.</p></Empty></>;
  if (model === "failed") return <><PageHead title="Model" /><Failed message={state?.model.message ?? ""} /></>;
  if (card.failed) return <Failed message={card.failed} />;
  if (!card.got) return <><PageHead title="Model" /><div class="waiting" aria-busy="true">{model === "ready" ? "Reading the model …" : "The model is loading …"}</div></>;
  const got = card.got;
  return (
    <>
      <PageHead title={got.source} lead={`${got.family} · ${millions(got.parameters)} parameters · ${got.layers.length} layers · width ${got.d_model} · ${got.vocab.toLocaleString("en")} tokens · ${got.dtype} on ${got.device}`} />
      <Panel title="Patch bay" aside={<CheckLine check={got.check} />}>
        <div class="bay" role="list" aria-label="Layers, the last on top">
          {[...got.layers].reverse().map((layer) => <LayerRow layer={layer} chosen={part} />)}
        </div>
        <p class="note">Choose a jack to see its ports, and what it reads and writes in tokens. {got.carried.join("; ")}</p>
      </Panel>
      {part && <PartPanel part={part} />}
    </>
  );
}

function CheckLine({ check }: { check: Card["check"] }) {
  return <span class={check.passed ? "good" : "bad"}>{check.passed ? "self-check passed" : "self-check FAILED"}: stream {number(check.stream)}, logits {number(check.logits)}, heads {number(check.heads)}</span>;
}

function LayerRow({ layer, chosen }: { layer: Layer; chosen: string }) {
  const name = `L${layer.layer}`;
  const jack = (part: string, text: string, kind: string) => (
    <a class={`jack ${kind}`} href={`#/model/${part}`} aria-current={chosen === part ? "true" : undefined} title={part}>{text}</a>
  );
  return (
    <div class="bay-row" role="listitem">
      <span class="bay-name">{jack(name, name, "layer")}</span>
      <span class="bay-parts">
        {Array.from({ length: layer.heads }, (_, i) => jack(`${name}.H${i}`, `H${i}`, "head"))}
        {layer.signals.includes("attn.out") && jack(`${name}.attn`, "attn", "wide")}
        {layer.signals.includes("mlp.out") && jack(`${name}.mlp`, layer.neurons ? `mlp ${layer.neurons.toLocaleString("en")}` : "mlp", "wide")}
        {Array.from({ length: Math.min(64, layer.experts) }, (_, i) => jack(`${name}.E${i}`, `E${i}`, "expert"))}
      </span>
    </div>
  );
}

function PartPanel({ part }: { part: string }) {
  const { got, failed, busy } = useGet<PartCard>(`/api/part?part=${encodeURIComponent(part)}`);
  return (
    <Panel title={got?.title ?? part} id="part">
      {failed && <Failed message={failed} />}
      {busy && !got && <div class="waiting" aria-busy="true">Reading {part} …</div>}
      {got?.sections.map((section) => <Table title={section.title} rows={section.rows} open />)}
    </Panel>
  );
}

function millions(n: number): string {
  return n >= 1e9 ? `${(n / 1e9).toFixed(1)} billion` : n >= 1e6 ? `${(n / 1e6).toFixed(1)} million` : n.toLocaleString("en");
}
