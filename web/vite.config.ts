import { defineConfig } from "vite";
import { digest } from "./sources";

// One ES module and one stylesheet, under fixed names, which the package carries: the same text gives the same files.
export default defineConfig({
  oxc: { jsx: { runtime: "automatic", importSource: "preact" } },
  publicDir: false,
  plugins: [
    {
      name: "sources",
      generateBundle() {
        this.emitFile({ type: "asset", fileName: "sources.sha256", source: `${digest(import.meta.dirname)}\n` });
      },
    },
  ],
  build: {
    outDir: "../patchbay/app/static",
    emptyOutDir: false,
    target: "es2022",
    cssCodeSplit: false,
    lib: { entry: "src/main.tsx", formats: ["es"], fileName: () => "patchbay.js", cssFileName: "patchbay" },
  },
});
