// Bars with signs: parts from the highest down, each with its interval and, behind it, what random parts gave.

import { ticks } from "./colour";
import { marked, number, visible } from "./data";

export interface Bar {
  name: string;
  value: number;
  low?: number | null;
  high?: number | null;
  nullMean?: number | null;
  nullLow?: number | null;
  nullHigh?: number | null;
  draws?: number[] | undefined; // of the control, one by one
  aside?: string;
  strong?: boolean;
  link?: string | undefined;
}

export function Bars({ bars, unit, label }: { bars: Bar[]; unit: string; label: string }) {
  const known = bars.flatMap((bar) => [bar.value, bar.low, bar.high, bar.nullHigh, bar.nullLow, bar.nullMean, ...(bar.draws ?? []), 0]);
  const finite = known.filter((value): value is number => typeof value === "number" && Number.isFinite(value));
  let [low, high] = [Math.min(...finite, 0), Math.max(...finite, 0)];
  if (low === high) high = 1;
  const pad = (high - low) * 0.03;
  low -= low < 0 ? pad : 0;
  high += high > 0 ? pad : 0;
  const at = (value: number) => (100 * (value - low)) / (high - low);
  const marks = ticks(low, high, 5);
  const texts = marked(marks);
  const hasNull = bars.some((bar) => has(bar.nullMean));
  const hasDraws = bars.some((bar) => bar.draws?.length);
  const hasInterval = bars.some((bar) => has(bar.low));
  return (
    <figure class="bars">
      {(hasNull || hasInterval || hasDraws) && (
        <p class="key">
          {hasInterval && <span><i class="key-whisker" /> 95 % interval</span>}
          {hasNull && <span><i class="key-null" /> random control</span>}
          {hasDraws && <span><i class="key-draw" /> random draws</span>}
        </p>
      )}
      <ol aria-label={label}>
        {bars.map((bar) => (
          <li class={bar.strong ? "strong" : ""} title={`${bar.name}: ${number(bar.value)} ${unit}${bar.aside ? `, ${bar.aside}` : ""}`}>
            <span class="bar-name">{bar.link ? <a href={bar.link}>{visible(bar.name)}</a> : visible(bar.name)}</span>
            <span class="bar-track" aria-hidden="true">
              {marks.map((mark) => (
                <i class={mark === 0 ? "grid zero" : "grid"} style={{ left: `${at(mark)}%` }} />
              ))}
              {has(bar.nullLow) && has(bar.nullHigh) && <i class="null" style={span(at(bar.nullLow), at(bar.nullHigh))} />}
              <i class={bar.value < 0 ? "bar below" : "bar"} style={span(at(0), at(bar.value))} />
              {has(bar.nullMean) && <i class="null-mean" style={{ left: `${at(bar.nullMean)}%` }} />}
              {bar.draws?.filter(has).map((draw) => <i class="draw" style={{ left: `${at(draw)}%` }} />)}
              {has(bar.low) && has(bar.high) && <i class="whisker" style={span(at(bar.low), at(bar.high))} />}
            </span>
            <span class="bar-value num">{number(bar.value)}</span>
          </li>
        ))}
      </ol>
      <div class={marks.length > 4 ? "bar-axis many" : "bar-axis"} aria-hidden="true">
        <span class="bar-name" />
        <span class="bar-track">
          {marks.map((mark, i) => (
            <span class="num" style={{ left: `${at(mark)}%` }}>{texts[i]}</span>
          ))}
        </span>
        <span class="bar-value">{unit}</span>
      </div>
    </figure>
  );
}

function has(value: number | null | undefined): value is number {
  return typeof value === "number" && Number.isFinite(value);
}

function span(a: number, b: number): { left: string; width: string } {
  return { left: `${Math.min(a, b)}%`, width: `${Math.abs(b - a)}%` };
}
