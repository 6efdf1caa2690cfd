// A map of cells: one canvas of the size of its window, drawn anew as it scrolls, so that a million cells cost what is seen of them.

import { useEffect, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import { css, ink, scaleOf, table, ticks, type Scale } from "./colour";
import { marked, number, short, visible, type Values } from "./data";
import { useDark, useWidth } from "./parts";

export interface HeatProps {
  values: Values;
  rows: string[];
  columns: string[];
  axes: [string, string];
  unit: string;
  label: string;
  upward?: boolean;
  square?: boolean;
  names?: string[] | null;
  marked?: Set<number>;
  range?: [number, number];
  told?: (place: number) => string;
  onPick?: (row: number, column: number) => void;
  picked?: number | null;
}

const FONT = '12px ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, sans-serif';
const SMALL = FONT.replace("12px", "11px");
const TALL = 620;

interface Layout {
  left: number;
  bottom: number;
  cell: [number, number];
  size: [number, number]; // of the whole drawing
  window: [number, number]; // of the canvas
  turned: boolean;
}

export function Heat(props: HeatProps) {
  const outer = useRef<HTMLDivElement>(null);
  const scroll = useRef<HTMLDivElement>(null);
  const canvas = useRef<HTMLCanvasElement>(null);
  const width = useWidth(outer);
  const dark = useDark();
  const [zoom, setZoom] = useState(1);
  const [at, setAt] = useState<number | null>(null);
  const n = props.columns.length;
  const scale = useMemo(() => {
    const [low, high] = props.range ?? rangeOf(props.values);
    return scaleOf(low, high, dark);
  }, [props.values, dark, props.range?.[0], props.range?.[1]]);
  const labels = useMemo(
    () => ({ rows: props.rows.map(visible), columns: props.columns.map(visible) }),
    [props.rows, props.columns],
  );
  const layout = useMemo(() => laidOut(props, labels, width, zoom), [props, labels, width, zoom]);
  const picture = useMemo(() => new Picture(props.values, props.rows.length, n, scale), [props.values, scale]);

  const draw = () => {
    const board = canvas.current;
    const view = scroll.current;
    if (board && view) paint(board, view, props, labels, layout, scale, picture);
  };
  useLayoutEffect(draw);
  useEffect(() => {
    const view = scroll.current;
    let waiting = 0;
    const moved = () => {
      cancelAnimationFrame(waiting);
      waiting = requestAnimationFrame(draw);
    };
    view?.addEventListener("scroll", moved, { passive: true });
    return () => view?.removeEventListener("scroll", moved);
  });

  const rowOf = (shown: number) => (props.upward ? props.rows.length - 1 - shown : shown);
  const placeAt = (event: PointerEvent | MouseEvent): number | null => {
    const box = canvas.current?.getBoundingClientRect();
    const view = scroll.current;
    if (!box || !view) return null;
    const x = event.clientX - box.left - layout.left + view.scrollLeft;
    const y = event.clientY - box.top + view.scrollTop;
    const column = Math.floor(x / layout.cell[0]);
    const row = Math.floor(y / layout.cell[1]);
    if (event.clientX - box.left < layout.left || column < 0 || column >= n || row < 0 || row >= props.rows.length) return null;
    if (event.clientY - box.top > layout.window[1] - layout.bottom) return null;
    return rowOf(row) * n + column;
  };
  const show = (place: number) => {
    setAt(place);
    const view = scroll.current;
    if (!view) return;
    const x = (place % n) * layout.cell[0];
    const y = rowOf(Math.floor(place / n)) * layout.cell[1];
    const [w, h] = [layout.window[0] - layout.left, layout.window[1] - layout.bottom];
    view.scrollTo(
      Math.min(Math.max(view.scrollLeft, x + layout.cell[0] - w), x),
      Math.min(Math.max(view.scrollTop, y + layout.cell[1] - h), y),
    );
  };
  const onKey = (event: KeyboardEvent) => {
    const step = props.upward ? -n : n;
    const place = at ?? props.picked ?? (props.upward ? (props.rows.length - 1) * n : 0);
    const moves: Record<string, number> = {
      ArrowRight: place % n < n - 1 ? place + 1 : place,
      ArrowLeft: place % n > 0 ? place - 1 : place,
      ArrowDown: place + step,
      ArrowUp: place - step,
      Home: place - (place % n),
      End: place - (place % n) + n - 1,
    };
    const next = moves[event.key];
    if (next !== undefined) {
      event.preventDefault();
      show(next >= 0 && next < props.values.length ? next : place);
    } else if ((event.key === "Enter" || event.key === " ") && at !== null && props.onPick) {
      event.preventDefault();
      props.onPick(Math.floor(at / n), at % n);
    } else if (event.key === "+" || event.key === "=") setZoom(Math.min(64, zoom * 2));
    else if (event.key === "-") setZoom(Math.max(1, zoom / 2));
    else if (event.key === "Escape") setAt(null);
  };
  const shown = at ?? props.picked ?? null;
  const zoomed = layout.cell[0] < 26 || layout.cell[1] < 14 || zoom > 1;
  return (
    <figure class="heat" ref={outer}>
      <div class="heat-bar">
        <output class="readout" aria-live="polite">
          {shown === null ? <span class="hint">{hint(props)}</span> : <Told {...props} place={shown} labels={labels} />}
        </output>
        {zoomed && (
          <span class="zoom" role="group" aria-label="Zoom">
            <button type="button" class="quiet" disabled={zoom <= 1} onClick={() => setZoom(zoom / 2)} aria-label="Zoom out">−</button>
            <button type="button" class="quiet" disabled={zoom === 1} onClick={() => setZoom(1)}>Fit</button>
            <button type="button" class="quiet" disabled={zoom >= 64} onClick={() => setZoom(zoom * 2)} aria-label="Zoom in">+</button>
          </span>
        )}
      </div>
      <div
        class="heat-scroll"
        ref={scroll}
        tabIndex={0}
        role="application"
        aria-roledescription="map of cells"
        aria-label={`${props.label}: ${props.rows.length} by ${n} cells, ${props.axes[0]} by ${props.axes[1]}. Arrow keys move from cell to cell.`}
        style={{ width: `${layout.window[0]}px`, height: `${layout.window[1] + 1}px` }}
        onKeyDown={onKey}
        onPointerMove={(event) => setAt(placeAt(event))}
        onPointerLeave={() => setAt(null)}
        onClick={(event) => {
          const place = placeAt(event);
          if (place !== null) props.onPick ? props.onPick(Math.floor(place / n), place % n) : setAt(place);
        }}
      >
        <div class="heat-space" style={{ width: `${layout.size[0]}px`, height: `${layout.size[1]}px` }}>
          <canvas ref={canvas} class={props.onPick ? "pick" : ""} />
          {shown !== null && (
            <div
              class="heat-mark"
              style={{
                left: `${layout.left + (shown % n) * layout.cell[0]}px`,
                top: `${rowOf(Math.floor(shown / n)) * layout.cell[1]}px`,
                width: `${Math.max(3, layout.cell[0])}px`,
                height: `${Math.max(3, layout.cell[1])}px`,
              }}
            />
          )}
        </div>
      </div>
      <Legend scale={scale} unit={props.unit} />
    </figure>
  );
}

function Told({ values, names, labels, columns, axes, unit, told, place }: HeatProps & { place: number; labels: { rows: string[]; columns: string[] } }) {
  const n = columns.length;
  const name = names?.[place];
  return (
    <>
      <b class="num">{number(values[place])}</b> {unit}
      <span class="where">
        {axes[0]} {labels.rows[Math.floor(place / n)]} · {axes[1]} {labels.columns[place % n]}
        {name ? ` · ${name}` : ""}
      </span>
      {told && <span class="beside">{told(place)}</span>}
    </>
  );
}

function hint(props: HeatProps): string {
  const cells = props.values.length;
  return `${cells.toLocaleString("en")} cells: point at one, or move with the arrow keys`;
}

export function Legend({ scale, unit }: { scale: Scale; unit: string }) {
  const stops = Array.from({ length: 17 }, (_, i) => css(scale.at(scale.low + ((scale.high - scale.low) * i) / 16)));
  const marks = scale.signed ? [scale.low, 0, scale.high] : ticks(scale.low, scale.high, 4);
  const texts = scale.signed ? marks.map(short) : marked(marks);
  const left = (value: number) => `${(100 * (value - scale.low)) / (scale.high - scale.low)}%`;
  return (
    <figcaption class="legend">
      <div class="legend-ramp" style={{ backgroundImage: `linear-gradient(to right, ${stops.join(", ")})` }} />
      <div class="legend-marks">
        {marks.map((value, i) => (
          <span class="num" style={{ left: left(value) }}>
            {texts[i]}
          </span>
        ))}
      </div>
      <span class="legend-unit">{unit}</span>
    </figcaption>
  );
}

// --- layout ---------------------------------------------------------------------------------------

let measuring: CanvasRenderingContext2D | null = null;

function textWidth(texts: string[], font: string): number {
  measuring ??= document.createElement("canvas").getContext("2d");
  if (!measuring) return 60;
  measuring.font = font;
  let most = 0;
  const step = Math.max(1, Math.floor(texts.length / 200));
  for (let i = 0; i < texts.length; i += step) most = Math.max(most, measuring.measureText(texts[i] as string).width);
  return Math.ceil(most);
}

function laidOut(props: HeatProps, labels: { rows: string[]; columns: string[] }, width: number, zoom: number): Layout {
  const [rows, n] = [props.rows.length, props.columns.length];
  const left = Math.min(Math.round(width * 0.34), Math.max(22, textWidth(labels.rows, FONT) + 12), 150);
  const room = Math.max(60, width - left - 2);
  const longest = textWidth(labels.columns, FONT);
  const least = props.names ? 62 : 0;
  let w = Math.max(least, room / n);
  w = Math.min(w, props.names ? 104 : 76);
  let h = props.square ? w : Math.min(34, Math.max(Math.min(22, TALL / rows), 440 / rows));
  if (props.names) h = 36;
  if (props.square) w = h = Math.min(w, 30, TALL / rows);
  w *= zoom;
  h *= zoom > 1 && !props.square && h >= 20 ? 1 : zoom;
  const turned = longest + 10 > w;
  const bottom = (turned ? Math.min(110, longest + 10) : 20) + 20;
  const size: [number, number] = [left + w * n + 1, h * rows + bottom];
  const bar = size[0] > width ? 14 : 0;
  return {
    left,
    bottom,
    cell: [w, h],
    size,
    window: [Math.min(width, Math.ceil(size[0])), Math.min(TALL + bottom, Math.ceil(size[1])) + bar],
    turned,
  };
}

function rangeOf(values: Values): [number, number] {
  let low = Infinity;
  let high = -Infinity;
  for (let i = 0; i < values.length; i++) {
    const value = values[i] as number;
    if (value < low && value > -Infinity) low = value;
    if (value > high && value < Infinity) high = value;
  }
  return low > high ? [0, 1] : [low, high];
}

// --- drawing --------------------------------------------------------------------------------------

/** The cells as a picture of one pixel each, or of one for several where there are more cells than pixels: the largest in size. */
class Picture {
  private made = new Map<string, HTMLCanvasElement>();
  constructor(private values: Values, private rows: number, private columns: number, private scale: Scale) {}

  pooled(across: number, down: number): HTMLCanvasElement {
    const key = `${across},${down}`;
    const known = this.made.get(key);
    if (known) return known;
    const [w, h] = [Math.ceil(this.columns / across), Math.ceil(this.rows / down)];
    const board = document.createElement("canvas");
    [board.width, board.height] = [w, h];
    const pen = board.getContext("2d");
    if (pen) {
      const image = pen.createImageData(w, h);
      const pixels = new Uint32Array(image.data.buffer);
      const { of, colours } = table(this.scale);
      for (let y = 0; y < h; y++)
        for (let x = 0; x < w; x++) pixels[y * w + x] = colours[of(this.largest(x * across, y * down, across, down))] as number;
      pen.putImageData(image, 0, 0);
    }
    if (this.made.size > 3) this.made.clear();
    this.made.set(key, board);
    return board;
  }

  private largest(x: number, y: number, across: number, down: number): number {
    if (across === 1 && down === 1) return this.values[y * this.columns + x] as number;
    let found = NaN;
    for (let row = y; row < Math.min(this.rows, y + down); row++)
      for (let column = x; column < Math.min(this.columns, x + across); column++) {
        const value = this.values[row * this.columns + column] as number;
        if (!(Math.abs(value) <= Math.abs(found)) && !Number.isNaN(value)) found = value;
      }
    return found;
  }
}

function paint(
  board: HTMLCanvasElement,
  view: HTMLElement,
  props: HeatProps,
  labels: { rows: string[]; columns: string[] },
  layout: Layout,
  scale: Scale,
  picture: Picture,
): void {
  const pen = board.getContext("2d");
  if (!pen) return;
  const ratio = Math.min(3, devicePixelRatio || 1);
  const bar = layout.size[0] > layout.window[0] ? 14 : 0;
  const [wide, high] = [layout.window[0], layout.window[1] - bar];
  if (board.width !== Math.round(wide * ratio) || board.height !== Math.round(high * ratio)) {
    board.width = Math.round(wide * ratio);
    board.height = Math.round(high * ratio);
    board.style.width = `${wide}px`;
    board.style.height = `${high}px`;
  }
  const soft = getComputedStyle(view).color;
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, wide, high);
  const [w, h] = layout.cell;
  const [rows, n] = [props.rows.length, props.columns.length];
  const tall = high - layout.bottom;
  const [x0, y0] = [view.scrollLeft, view.scrollTop];
  pen.save();
  pen.beginPath();
  pen.rect(layout.left, 0, wide - layout.left, Math.min(tall, h * rows));
  pen.clip();
  if (w < 5 || h < 5) blocks(pen, picture, props, layout, x0, y0, ratio);
  else cells(pen, props, layout, scale, x0, y0, wide, tall);
  pen.restore();
  pen.fillStyle = soft;
  pen.font = FONT;
  pen.textBaseline = "middle";
  pen.textAlign = "right";
  const downStep = Math.max(1, Math.ceil(14 / h));
  for (let shown = 0; shown < rows; shown++) {
    const row = props.upward ? rows - 1 - shown : shown;
    const y = shown * h - y0 + h / 2;
    if (row % downStep || y < 0 || y > tall) continue;
    pen.fillText(clipped(pen, labels.rows[row] as string, layout.left - 8), layout.left - 8, y);
  }
  const acrossStep = Math.max(1, Math.ceil((layout.turned ? 14 : 18) / w));
  for (let column = 0; column < n; column += acrossStep) {
    const x = layout.left + column * w - x0 + w / 2;
    if (x < layout.left || x > wide) continue;
    pen.save();
    pen.translate(x, Math.min(tall, h * rows) + 6);
    if (layout.turned) {
      pen.rotate(-Math.PI / 2);
      pen.textAlign = "right";
      pen.fillText(clipped(pen, labels.columns[column] as string, layout.bottom - 26), 0, 0);
    } else {
      pen.textAlign = "center";
      pen.textBaseline = "top";
      pen.fillText(labels.columns[column] as string, 0, 1);
    }
    pen.restore();
  }
  pen.fillStyle = soft;
  pen.font = SMALL;
  pen.textAlign = "left";
  pen.textBaseline = "alphabetic";
  pen.fillText(`${props.axes[1]} →   ${props.axes[0]} ${props.upward ? "↑" : "↓"}`, layout.left, high - 4);
}

function blocks(pen: CanvasRenderingContext2D, picture: Picture, props: HeatProps, layout: Layout, x0: number, y0: number, ratio: number): void {
  const [w, h] = layout.cell;
  const across = Math.max(1, Math.ceil(1 / (w * ratio) - 1e-9));
  const down = Math.max(1, Math.ceil(1 / (h * ratio) - 1e-9));
  const image = picture.pooled(across, down);
  pen.imageSmoothingEnabled = false;
  const rows = props.rows.length;
  if (props.upward) {
    pen.translate(0, rows * h - y0);
    pen.scale(1, -1);
    pen.drawImage(image, layout.left - x0, 0, image.width * across * w, image.height * down * h);
  } else pen.drawImage(image, layout.left - x0, -y0, image.width * across * w, image.height * down * h);
}

function cells(
  pen: CanvasRenderingContext2D,
  props: HeatProps,
  layout: Layout,
  scale: Scale,
  x0: number,
  y0: number,
  wide: number,
  tall: number,
): void {
  const [w, h] = layout.cell;
  const [rows, n] = [props.rows.length, props.columns.length];
  const gap = w > 12 && h > 10 ? 1.5 : w > 7 && h > 7 ? 0.5 : 0;
  const round = w > 20 && h > 16 ? 3 : 0;
  const written = !props.square && w >= 40 && h >= 17;
  pen.font = SMALL;
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  const first = Math.max(0, Math.floor(x0 / w));
  const last = Math.min(n, Math.ceil((x0 + wide - layout.left) / w));
  for (let shown = Math.max(0, Math.floor(y0 / h)); shown < Math.min(rows, Math.ceil((y0 + tall) / h)); shown++) {
    const row = props.upward ? rows - 1 - shown : shown;
    for (let column = first; column < last; column++) {
      const place = row * n + column;
      const value = props.values[place] as number;
      const [x, y] = [layout.left + column * w - x0, shown * h - y0];
      const colour = scale.at(value);
      pen.fillStyle = css(colour);
      pen.beginPath();
      pen.roundRect(x + gap / 2, y + gap / 2, w - gap, h - gap, round);
      pen.fill();
      if (props.marked?.has(place)) {
        pen.strokeStyle = ink(colour);
        pen.lineWidth = 2;
        pen.stroke();
      }
      if (!written) continue;
      pen.fillStyle = ink(colour);
      const name = props.names?.[place];
      if (name && h >= 32) {
        pen.fillText(clipped(pen, name, w - 6), x + w / 2, y + h / 2 - 7);
        pen.globalAlpha = 0.78;
        pen.fillText(short(value), x + w / 2, y + h / 2 + 8);
        pen.globalAlpha = 1;
      } else pen.fillText(short(value), x + w / 2, y + h / 2 + 0.5);
    }
  }
}

function clipped(pen: CanvasRenderingContext2D, text: string, width: number): string {
  if (pen.measureText(text).width <= width) return text;
  let end = text.length;
  while (end > 1 && pen.measureText(`${text.slice(0, end)}…`).width > width) end--;
  return `${text.slice(0, end)}…`;
}
