import js from "@eslint/js";
import globals from "globals";

export default [
  { ignores: ["node_modules"] },
  js.configs.recommended,
  {
    files: ["src/**/*.js"],
    languageOptions: { globals: globals.browser },
    rules: {
      "no-control-regex": "off", // what is invisible in a token is looked for by its code
      "no-misleading-character-class": "off",
      eqeqeq: "error",
      "no-implicit-globals": "error",
      "no-restricted-properties": [
        "error",
        { property: "innerHTML", message: "text of a model or a file is never markup: use textContent" },
        { property: "outerHTML", message: "text of a model or a file is never markup: use textContent" },
        {
          property: "insertAdjacentHTML",
          message: "text of a model or a file is never markup: use textContent",
        },
        { object: "document", property: "write", message: "text of a model or a file is never markup" },
      ],
      "no-eval": "error",
      "no-implied-eval": "error",
      "prefer-const": "error",
    },
  },
  { files: ["*.js"], languageOptions: { globals: globals.node } },
];
