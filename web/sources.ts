// The digest of what the built files are made from, which a test of the package compares without Node.
import { createHash } from "node:crypto";
import { readFileSync, readdirSync } from "node:fs";
import { join } from "node:path";

export function digest(root: string): string {
  const made = createHash("sha256");
  const names = ["package.json", "tsconfig.json", "vite.config.ts", ...readdirSync(join(root, "src")).sort().map((name) => `src/${name}`)];
  for (const name of names) made.update(`${name}\n`).update(readFileSync(join(root, name)));
  return made.digest("hex");
}
