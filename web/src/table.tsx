// Rows that can be sorted by any column and copied as CSV.

import { useMemo, useState } from "preact/hooks";
import { cellText, visible, type Cell, type Row } from "./data";
import { Copy } from "./parts";

const FIRST = 12;

export function Table({ rows, n, title, open, link }: { rows: Row[]; n?: number; title?: string; open?: boolean; link?: (row: Row) => string | undefined }) {
  const columns = useMemo(() => [...new Set(rows.flatMap((row) => Object.keys(row)))], [rows]);
  const [by, setBy] = useState<{ column: string; down: boolean } | null>(null);
  const [all, setAll] = useState(Boolean(open));
  const numeric = useMemo(() => new Set(columns.filter((column) => rows.some((row) => typeof row[column] === "number") && rows.every((row) => isNumber(row[column])))), [rows]);
  const sorted = useMemo(() => (by ? [...rows].sort((a, b) => compare(a[by.column], b[by.column]) * (by.down ? -1 : 1)) : rows), [rows, by]);
  if (!rows.length) return null;
  const shown = all ? sorted : sorted.slice(0, FIRST);
  const total = n ?? rows.length;
  return (
    <div class="table-box">
      <div class="table-bar">
        {title && <h3>{title}</h3>}
        <span class="count">{total > shown.length ? `${shown.length} of ${total.toLocaleString("en")} rows` : `${total} row${total === 1 ? "" : "s"}`}</span>
        {rows.length > FIRST && (
          <button type="button" class="quiet" aria-expanded={all} onClick={() => setAll(!all)}>{all ? "Fewer" : `All ${rows.length}`}</button>
        )}
        <Copy label="Copy as CSV" text={() => csv(columns, sorted)} />
      </div>
      <div class="table-scroll" tabIndex={0} role="region" aria-label={title ?? "Table"}>
        <table>
          <thead>
            <tr>
              {columns.map((column) => (
                <th class={numeric.has(column) ? "num" : ""} aria-sort={by?.column === column ? (by.down ? "descending" : "ascending") : "none"}>
                  <button type="button" onClick={() => setBy({ column, down: by?.column === column ? !by.down : numeric.has(column) })}>
                    {column.replace(/_/g, " ") || "what"}
                    <span aria-hidden="true">{by?.column === column ? (by.down ? " ↓" : " ↑") : ""}</span>
                  </button>
                </th>
              ))}
            </tr>
          </thead>
          <tbody>
            {shown.map((row) => (
              <tr>
                {columns.map((column, i) => {
                  const text = said(row[column]);
                  const to = i === linkAt(columns) ? link?.(row) : undefined;
                  return <td class={numeric.has(column) ? "num" : text.length <= 24 ? "whole" : ""}>{to ? <a href={to}>{text}</a> : text}</td>;
                })}
              </tr>
            ))}
          </tbody>
        </table>
      </div>
    </div>
  );
}

function linkAt(columns: string[]): number {
  const at = columns.indexOf("part");
  return at < 0 ? 0 : at;
}

function said(cell: Cell | undefined): string {
  return typeof cell === "string" ? visible(cell) : Array.isArray(cell) ? cell.map((one) => (typeof one === "string" ? visible(one) : cellText(one))).join(", ") : cellText(cell);
}

function isNumber(cell: Cell | undefined): boolean {
  return typeof cell === "number" || cell === null || cell === undefined || cell === "inf" || cell === "-inf";
}

function compare(a: Cell | undefined, b: Cell | undefined): number {
  if (typeof a === "number" && typeof b === "number") return a - b;
  if (typeof a === "number" || typeof b === "number") return typeof a === "number" ? 1 : -1; // what has no value comes last, highest first
  return cellText(a).localeCompare(cellText(b), "en", { numeric: true });
}

/** Rows as CSV; a text that a spreadsheet would run as a formula is set in quotes behind an apostrophe. */
export function csv(columns: string[], rows: Row[]): string {
  const quoted = (cell: Cell | undefined) => {
    const text = typeof cell === "number" ? String(cell) : cellText(cell);
    const safe = typeof cell === "string" && /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
    return /[",\n\r]/.test(safe) ? `"${safe.replace(/"/g, '""')}"` : safe;
  };
  return [columns, ...rows.map((row) => columns.map((column) => row[column]))].map((line) => line.map((cell) => quoted(cell as Cell)).join(",")).join("\n") + "\n";
}
