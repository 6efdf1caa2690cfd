// One number: its value with its interval, what chance gave beside it (each draw a mark, or one line), and the groups of its table.

import { Bars, type Bar } from "./bars";
import { valuesOf, variable, words, type ResultDoc, type Row, type Variable } from "./data";

const GROUPS = 24;

export function OneNumber({ doc, chosen }: { doc: ResultDoc; chosen: Variable }) {
  const main = chosen.name === doc.main;
  const only = (name: string) => {
    const found = variable(doc, name);
    return found && found.axes.length === 0 ? (valuesOf(found)?.[0] ?? null) : null;
  };
  const end = (name: string) => only(`${chosen.name}_${name}`) ?? (main ? only(name) : null);
  const chance = main ? variable(doc, "null") : undefined;
  const draws = chance && chance.axes.length && chance.unit === chosen.unit ? Array.from(valuesOf(chance) ?? []) : undefined;
  const groups = main ? (doc.tables["groups"]?.rows ?? []).slice(0, GROUPS) : [];
  const own: Bar = {
    name: groups.length ? "all" : words(chosen.name), value: valuesOf(chosen)?.[0] ?? NaN, low: end("low"), high: end("high"), draws,
    nullMean: main ? (only("null") ?? only("null_mean")) : null, nullLow: main ? only("null_low") : null, nullHigh: main ? only("null_high") : null, strong: groups.length > 0,
  };
  return <Bars bars={[own, ...groups.map(bar)]} unit={chosen.unit} label={`${words(chosen.name)} in ${chosen.unit}`} />;
}

function bar(row: Row): Bar {
  const at = (name: string) => (typeof row[name] === "number" ? (row[name] as number) : null);
  return { name: String(row["group"]), value: at("value") ?? NaN, low: at("low"), high: at("high") };
}
