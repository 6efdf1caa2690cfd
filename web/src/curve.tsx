// Curves over an ordered axis: lines with their bands, the random control as a grey one, and what stands at the pointer.

import { useRef, useState } from "preact/hooks";
import { ticks } from "./colour";
import { marked, number } from "./data";
import { useWidth } from "./parts";

export interface Line {
  name: string;
  y: ArrayLike<number>;
  low?: ArrayLike<number> | null;
  high?: ArrayLike<number> | null;
  control?: boolean;
}

export interface CurveProps {
  x: number[];
  names?: string[] | undefined;
  lines: Line[];
  axis: string;
  unit: string;
  label: string;
}

export function Curve({ x, names, lines, axis, unit, label }: CurveProps) {
  const box = useRef<HTMLElement>(null);
  const width = useWidth(box);
  const [at, setAt] = useState<number | null>(null);
  const [left, right, top, bottom] = [56, 14, 10, 40];
  const height = Math.round(Math.min(300, Math.max(190, width * 0.46)));
  const all = lines.flatMap((line) => [...finite(line.y), ...finite(line.low), ...finite(line.high)]);
  let [low, high] = [Math.min(...all, 0), Math.max(...all, 0)];
  if (low === high) high = low + 1;
  const room = (high - low) * 0.06;
  [low, high] = [low < 0 ? low - room : low, high + room];
  const [first, last] = [Math.min(...x), Math.max(...x)];
  const px = (value: number) => left + ((width - left - right) * (value - first)) / (last - first || 1);
  const py = (value: number) => top + ((height - top - bottom) * (high - value)) / (high - low);
  const marks = ticks(low, high, 5);
  const texts = marked(marks);
  const steps = names ? x : x.length <= 9 ? x : ticks(first, last, 7);
  const nearest = (clientX: number) => {
    const rect = box.current?.querySelector("svg")?.getBoundingClientRect();
    if (!rect) return null;
    const gaps = x.map((value) => Math.abs(px(value) - (clientX - rect.left)));
    return gaps.indexOf(Math.min(...gaps));
  };
  const onKey = (event: KeyboardEvent) => {
    const step = event.key === "ArrowRight" ? 1 : event.key === "ArrowLeft" ? -1 : 0;
    if (!step) return;
    event.preventDefault();
    setAt(Math.max(0, Math.min(x.length - 1, (at ?? (step > 0 ? -1 : x.length)) + step)));
  };
  return (
    <figure class="curve" ref={box}>
      <output class="readout" aria-live="polite">
        {at === null ? (
          <span class="hint">{axis}: point at a step, or move with the arrow keys</span>
        ) : (
          <>
            <span class="where">{axis} {names?.[at] ?? number(x[at])}</span>
            {lines.map((line, i) => Number.isFinite(line.y[at]) && (
              <span class={`told series-${line.control ? "control" : i % 6}`}>
                <i /> {line.name} <b class="num">{number(line.y[at])}</b>
                {line.low && line.high && Number.isFinite(line.low[at]) && (
                  <span class="num"> ({number(line.low[at])} to {number(line.high[at])})</span>
                )}
              </span>
            ))}
          </>
        )}
      </output>
      <svg
        viewBox={`0 0 ${width} ${height}`}
        width={width}
        height={height}
        tabIndex={0}
        role="application"
        aria-roledescription="curve"
        aria-label={`${label}, over ${axis}. Arrow keys move from step to step.`}
        onKeyDown={onKey}
        onPointerMove={(event) => setAt(nearest(event.clientX))}
        onPointerLeave={() => setAt(null)}
      >
        {marks.map((mark, i) => (
          <g>
            <line class={mark === 0 ? "zero" : "grid"} x1={left} x2={width - right} y1={py(mark)} y2={py(mark)} />
            <text class="num" x={left - 8} y={py(mark)} text-anchor="end" dominant-baseline="middle">{texts[i]}</text>
          </g>
        ))}
        {steps.map((step, i) => (
          <text class="num" x={px(step)} y={height - bottom + 16} text-anchor="middle">{names ? (names.length > 14 && i % Math.ceil(names.length / 14) ? "" : names[i]) : `${+step.toPrecision(6)}`}</text>
        ))}
        <text class="axis" x={(left + width - right) / 2} y={height - 4} text-anchor="middle">{axis}</text>
        {lines.map((line, i) => (
          <g class={`series-${line.control ? "control" : i % 6}`}>
            {line.low && line.high && <path class="band" d={band(x, line.low, line.high, px, py)} />}
            <path class="line" d={path(x, line.y, px, py)} />
            {x.length <= 40 && x.map((value, j) => Number.isFinite(line.y[j]) && <circle cx={px(value)} cy={py(line.y[j] as number)} r={at === j ? 5 : 3} />)}
          </g>
        ))}
        {at !== null && <line class="at" x1={px(x[at] as number)} x2={px(x[at] as number)} y1={top} y2={height - bottom} />}
      </svg>
      <p class="key">
        {lines.map((line, i) => (
          <span class={`series-${line.control ? "control" : i % 6}`}><i /> {line.name}</span>
        ))}
        {unit && <span class="legend-unit">in {unit}</span>}
      </p>
    </figure>
  );
}

function finite(values: ArrayLike<number> | null | undefined): number[] {
  return values ? Array.from(values).filter(Number.isFinite) : [];
}

function path(x: number[], y: ArrayLike<number>, px: (v: number) => number, py: (v: number) => number): string {
  let pen = "M";
  let made = "";
  x.forEach((value, i) => {
    if (!Number.isFinite(y[i])) {
      pen = "M";
      return;
    }
    made += `${pen}${px(value).toFixed(1)} ${py(y[i] as number).toFixed(1)}`;
    pen = "L";
  });
  return made;
}

function band(x: number[], low: ArrayLike<number>, high: ArrayLike<number>, px: (v: number) => number, py: (v: number) => number): string {
  const there = x.map((_, i) => i).filter((i) => Number.isFinite(low[i]) && Number.isFinite(high[i]));
  if (there.length < 2) return "";
  const point = (i: number, y: ArrayLike<number>) => `${px(x[i] as number).toFixed(1)} ${py(y[i] as number).toFixed(1)}`;
  return `M${there.map((i) => point(i, high)).join("L")}L${there.reverse().map((i) => point(i, low)).join("L")}Z`;
}
