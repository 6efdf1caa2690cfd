// A prompt as its tokens, each on the colour of a number: surprise, a score, attention from the token that is chosen.

import { css, ink, scaleOf } from "./colour";
import { number, visible } from "./data";
import { Legend } from "./heat";
import { useDark } from "./parts";

export interface TokensProps {
  tokens: string[];
  values?: ArrayLike<number> | undefined;
  unit?: string;
  label: string;
  chosen?: number | null;
  onPick?: (place: number) => void;
  legend?: boolean;
}

export function Tokens({ tokens, values, unit, label, chosen, onPick, legend }: TokensProps) {
  const dark = useDark();
  const known = values ? Array.from(values).filter(Number.isFinite) : [];
  const scale = known.length ? scaleOf(Math.min(...known, 0), Math.max(...known), dark) : null;
  return (
    <div class="tokens-box">
      <div class="tokens" role="group" aria-label={label}>
        {tokens.map((token, i) => {
          const value = values?.[i];
          const colour = scale && value !== undefined ? scale.at(value) : null;
          const said = `${i} ${visible(token)}${value === undefined ? "" : `: ${number(value)} ${unit ?? ""}`}`;
          const look = colour ? { background: css(colour), color: ink(colour) } : {};
          const text = <>{token.startsWith(" ") ? <span class="space">{" "}</span> : null}{visible(token.trim() ? token.trim() : token)}</>;
          return onPick ? (
            <button type="button" class="token" style={look} title={said} aria-pressed={chosen === i} onClick={() => onPick(i)}>{text}</button>
          ) : (
            <span class={`token ${chosen === i ? "chosen" : ""}`} style={look} title={said}>{text}</span>
          );
        })}
      </div>
      {legend && scale && <Legend scale={scale} unit={unit ?? ""} />}
    </div>
  );
}
