// Colours of values: orange over the ground (0) to blue where both signs occur, else the ground to blue. Both are told apart
// by people who do not see red and green apart, and by their lightness alone within a sign.

export type Rgb = [number, number, number];

export interface Scale {
  low: number;
  high: number;
  signed: boolean;
  at: (value: number) => Rgb;
}

interface Stops {
  below: Rgb[];
  zero: Rgb;
  above: Rgb[];
  none: Rgb;
}

const LIGHT: Stops = {
  below: [[250, 222, 196], [236, 154, 92], [190, 82, 12], [122, 46, 0]],
  zero: [250, 250, 248],
  above: [[205, 227, 243], [112, 174, 219], [22, 108, 170], [4, 58, 104]],
  none: [217, 222, 228],
};
const DARK: Stops = {
  below: [[74, 44, 24], [150, 80, 30], [226, 132, 62], [255, 205, 160]],
  zero: [30, 37, 45],
  above: [[26, 58, 82], [34, 104, 152], [80, 168, 226], [190, 228, 255]],
  none: [58, 66, 74],
};

export function scaleOf(low: number, high: number, dark: boolean): Scale {
  const stops = dark ? DARK : LIGHT;
  const signed = low < 0;
  const most = Math.max(-low, high) || 1;
  const from = signed ? -most : low >= 0 && low < high / 2 ? 0 : low;
  const to = signed ? most : high > from ? high : from + 1;
  const at = (value: number): Rgb => {
    if (!Number.isFinite(value)) return stops.none;
    const share = signed ? value / most : (value - from) / (to - from);
    return along([stops.zero, ...(share < 0 ? stops.below : stops.above)], Math.min(1, Math.abs(share)));
  };
  return { low: from, high: to, signed, at };
}

function along(stops: Rgb[], share: number): Rgb {
  const place = share * (stops.length - 1);
  const left = Math.min(stops.length - 2, Math.floor(place));
  const a = stops[left] as Rgb;
  const b = stops[left + 1] as Rgb;
  return [0, 1, 2].map((i) => Math.round((a[i] as number) + (place - left) * ((b[i] as number) - (a[i] as number)))) as Rgb;
}

export function css(colour: Rgb): string {
  return `rgb(${colour.join(" ")})`;
}

/** Black or white, whichever has the higher contrast on a colour (WCAG 2). */
export function ink(colour: Rgb): string {
  const [r, g, b] = colour.map((part) => {
    const share = part / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  }) as Rgb;
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000000" : "#ffffff"; // where both give 4.6 to 1; a softer black would leave a gap below 4.5
}

/** A table of 512 colours, for pictures of many cells. */
export function table(scale: Scale): { of: (value: number) => number; none: number; colours: Uint32Array } {
  const n = 512;
  const colours = new Uint32Array(n + 1);
  const pack = ([r, g, b]: Rgb) => ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
  for (let i = 0; i < n; i++) colours[i] = pack(scale.at(scale.low + ((scale.high - scale.low) * i) / (n - 1)));
  colours[n] = pack(scale.at(NaN));
  const step = (n - 1) / (scale.high - scale.low);
  const of = (value: number) =>
    Number.isNaN(value) ? n : Math.max(0, Math.min(n - 1, Math.round((value - scale.low) * step)));
  return { of, none: n, colours };
}

/** Round steps that cover a range: 1, 2 or 5 times a power of ten. */
export function ticks(low: number, high: number, about = 5): number[] {
  if (!(high > low)) return [low];
  const raw = (high - low) / about;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * ([1, 2, 5, 10].find((m) => m * 1.3 >= raw / power) ?? 10);
  const found: number[] = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}
