// Text of unknown origin as nodes: Markdown, LaTeX as MathML, differences. Everything becomes a text node or an element of the names
// below, in which characters that cannot be seen are named; nothing is ever parsed as HTML, and there are no links.

export function el(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "on") for (const [event, listener] of Object.entries(value)) made.addEventListener(event, listener);
    else if (key.includes("-") || key === "role" || key === "for") made.setAttribute(key, value);
    else if (value !== undefined) made[key] = value;
  }
  made.append(...children.flatMap((child) => (typeof child === "string" ? plainNodes(child) : child || [])));
  return made;
}

// Characters that change how others look, or that cannot be seen, as their names.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;
const LONGEST = 200_000; // characters that are rendered; longer texts are shown as they are

function plainNodes(text) {
  const nodes = [];
  let last = 0;
  for (const found of text.matchAll(HIDDEN)) {
    nodes.push(text.slice(last, found.index));
    const code = found[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    nodes.push(el("span", { className: "hidden-character", title: "a character that cannot be seen" }, `U+${code}`));
    last = found.index + 1;
  }
  nodes.push(text.slice(last));
  return nodes.filter((node) => node !== "");
}

export function rendered(text, raw) {
  const nodes = raw || text.length > LONGEST ? [text] : blocks(text.split("\n"), 0);
  return el("div", { className: raw ? "text raw" : "text", dir: "auto" }, ...nodes);
}

// Markdown

const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const CELLS = /^\s*\|?.*\|.*$/;
const RULER = /^\s*\|?\s*:?-{2,}:?\s*(\|\s*:?-{2,}:?\s*)*\|?\s*$/;

function blocks(lines, depth) {
  const found = [];
  const paragraph = [];
  let at = 0;
  const add = (...nodes) => {
    if (paragraph.length) found.push(el("p", {}, ...inline(paragraph.join("\n"))));
    paragraph.length = 0;
    found.push(...nodes);
  };
  const take = (test, from = at) => { // the next lines that pass a test
    while (at < lines.length && test(lines[at])) at++;
    return lines.slice(from, at);
  };
  while (at < lines.length) {
    const line = lines[at++];
    const fence = /^\s*(```+|~~~+)\s*([\w+-]*)/.exec(line);
    const heading = /^\s{0,3}(#{1,6})\s+(.*)$/.exec(line);
    const display = /^\s*(\$\$|\\\[)(.*)$/.exec(line);
    if (fence) {
      const code = take((one) => !one.trim().startsWith(fence[1]));
      at++;
      add(el("pre", {}, el("code", {}, code.join("\n"))));
    } else if (display) {
      const end = display[1] === "$$" ? "$$" : "\\]";
      const further = [display[2], ...lines.slice(at, at + 200)];
      const last = further.findIndex((one) => one.includes(end));
      const text = further.slice(0, last + 1).join("\n");
      const after = text.slice(text.indexOf(end) + 2);
      if (last >= 0) add(mathNode(text.slice(0, text.indexOf(end)), true));
      if (last < 0 || after.trim()) paragraph.push(last < 0 ? line : after);
      at += Math.max(last, 0);
    } else if (heading) {
      add(el("p", { className: `heading h${heading[1].length}`, role: "heading", "aria-level": 5 }, ...inline(heading[2])));
    } else if (/^\s*([-*_])(\s*\1){2,}\s*$/.test(line)) {
      add(el("hr"));
    } else if (/^\s*>/.test(line) && depth < 8) {
      const inner = take((one) => /^\s*>/.test(one), at - 1);
      add(el("blockquote", {}, ...blocks(inner.map((one) => one.replace(/^\s*>\s?/, "")), depth + 1)));
    } else if (ITEM.test(line)) {
      const items = take((one) => ITEM.test(one), at - 1).map((one) => ITEM.exec(one));
      const start = parseInt(items[0][2], 10);
      const entries = items.map(([, indent, , text]) => el("li", { className: `depth${Math.min(indent.length >> 1, 4)}` }, ...inline(text)));
      add(isNaN(start) ? el("ul", {}, ...entries) : el("ol", { start }, ...entries));
    } else if (CELLS.test(line) && at < lines.length && RULER.test(lines[at]) && lines[at].includes("-")) {
      const row = (text, name) => {
        const cells = text.trim().replace(/^\||\|$/g, "").split("|");
        return el("tr", {}, ...cells.map((cell) => el(name, {}, ...inline(cell.trim()))));
      };
      at++;
      const rows = take((one) => CELLS.test(one) && one.trim()).map((one) => row(one, "td"));
      add(el("div", { className: "scrolls" }, el("table", {}, el("thead", {}, row(line, "th")), el("tbody", {}, ...rows))));
    } else if (line.trim()) paragraph.push(line);
    else add();
  }
  add();
  return found;
}

// The alternatives, in order: code, math, an image's or a video's place, bold, italic, struck, a link, an escaped character.
const INLINE = new RegExp(
  [
    "(`+)(?<code>[^`]+)\\1",
    "\\$\\$(?<display>[^$]+)\\$\\$",
    "(?<![\\\\$\\w])\\$(?<math>(?=[^\\s$])[^$\\n]{1,2000}?(?<=[^\\s\\\\]))\\$(?![\\d$])",
    "\\\\\\((?<round>[^]{1,5000}?)\\\\\\)",
    "\\\\\\[(?<square>[^]{1,5000}?)\\\\\\]",
    "<(?<file>image|video)>",
    "\\*\\*(?<bold>(?=\\S)[^*]+)\\*\\*",
    "(?<![*\\w])\\*(?<italic>(?=\\S)[^*\\n]+)\\*(?!\\w)",
    "(?<!\\w)_(?<under>(?=\\S)[^_\\n]+)_(?!\\w)",
    "~~(?<struck>[^~\\n]+)~~",
    "!?\\[(?<link>[^\\]\\n]{0,500})\\]\\((?<address>[^)\\s]{1,2000})\\)",
    "\\\\(?<escaped>[\\\\`*_{}#+.!|$-])",
  ].join("|"),
  "g",
);

function inline(text, depth = 0) {
  const nodes = [];
  let last = 0;
  for (const found of text.matchAll(INLINE)) {
    const own = found.groups;
    nodes.push(text.slice(last, found.index));
    last = found.index + found[0].length;
    const math = own.math ?? own.round;
    const inner = (value) => (depth < 4 ? inline(value, depth + 1) : [value]);
    if (own.code !== undefined) nodes.push(el("code", {}, own.code));
    else if (math !== undefined) nodes.push(mathNode(math, false));
    else if (own.display !== undefined || own.square !== undefined) nodes.push(mathNode(own.display ?? own.square, true));
    else if (own.file !== undefined) nodes.push(el("span", { className: "chip" }, own.file));
    else if (own.bold !== undefined) nodes.push(el("strong", {}, ...inner(own.bold)));
    else if (own.italic !== undefined || own.under !== undefined) nodes.push(el("em", {}, ...inner(own.italic ?? own.under)));
    else if (own.struck !== undefined) nodes.push(el("s", {}, ...inner(own.struck)));
    else if (own.link !== undefined) nodes.push(...inner(own.link), el("span", { className: "address" }, ` (${own.address})`));
    else nodes.push(own.escaped);
  }
  nodes.push(text.slice(last));
  return nodes;
}

// LaTeX

const MATHML = "http://www.w3.org/1998/Math/MathML";
const GREEK = "alpha α beta β gamma γ delta δ epsilon ε varepsilon ε zeta ζ eta η theta θ iota ι kappa κ lambda λ mu μ nu ν xi ξ " +
  "pi π rho ρ sigma σ tau τ upsilon υ phi ϕ varphi φ chi χ psi ψ omega ω Gamma Γ Delta Δ Theta Θ Lambda Λ Xi Ξ Pi Π Sigma Σ Phi Φ " +
  "Psi Ψ Omega Ω infty ∞ ell ℓ hbar ℏ partial ∂ nabla ∇ emptyset ∅ varnothing ∅ degree ° prime ′ imath ı jmath ȷ";
const SIGNS = "times × cdot ⋅ div ÷ pm ± mp ∓ le ≤ leq ≤ ge ≥ geq ≥ ne ≠ neq ≠ approx ≈ equiv ≡ sim ∼ cong ≅ propto ∝ to → " +
  "rightarrow → leftarrow ← Rightarrow ⇒ Leftarrow ⇐ implies ⟹ iff ⟺ leftrightarrow ↔ mapsto ↦ in ∈ notin ∉ subset ⊂ subseteq ⊆ " +
  "cup ∪ cap ∩ setminus ∖ forall ∀ exists ∃ neg ¬ land ∧ lor ∨ sum ∑ prod ∏ int ∫ iint ∬ oint ∮ angle ∠ triangle △ parallel ∥ " +
  "perp ⊥ circ ∘ bullet ∙ star ⋆ ast ∗ cdots ⋯ ldots … dots … vdots ⋮ ddots ⋱ langle ⟨ rangle ⟩ lfloor ⌊ rfloor ⌋ lceil ⌈ " +
  "rceil ⌉ mid ∣ therefore ∴ because ∵ oplus ⊕ otimes ⊗ ll ≪ gg ≫ lbrace { rbrace } vert | Vert ‖ backslash \\";
const table = (text) => new Map(text.split(" ").flatMap((_, at, all) => (at % 2 ? [] : [[all[at], all[at + 1]]])));
const LETTERS = table(GREEK);
const OPERATORS = table(SIGNS);
const NAMED = new Set("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp lim max min sup inf det dim gcd deg arg mod Pr".split(" "));
const TEXTS = new Set(["text", "textbf", "textit", "textrm", "mathrm", "operatorname", "mbox", "mathbf", "mathit", "mathbb", "mathcal", "mathsf", "boldsymbol"]);
const ACCENTS = new Map([["overline", "¯"], ["bar", "¯"], ["hat", "^"], ["widehat", "^"], ["vec", "→"], ["tilde", "~"], ["dot", "˙"], ["overrightarrow", "→"]]);
const SPACES = new Set([",", ";", ":", "!", " ", "quad", "qquad", "displaystyle", "textstyle", "limits", "nolimits", "big", "Big", "bigg", "Bigg", "hline"]);

function m(name, ...children) {
  const made = document.createElementNS(MATHML, name);
  made.append(...children);
  return made;
}

export function mathNode(source, display) {
  let node;
  try {
    if (source.length > 5000) throw new Error("long");
    const parser = new Latex(source);
    node = m("math", parser.row(() => parser.done, 0));
    if (display) node.setAttribute("display", "block");
  } catch {
    node = el("code", { className: "latex" }, source); // what is not understood is shown as written
  }
  return el("span", { className: display ? "math display" : "math", title: source }, node);
}

class Latex {
  constructor(source) {
    this.tokens = source.match(/\\[a-zA-Z]+\*?|\\[^]|\d+(?:[.,]\d+)*|\s+|[^]/gu) ?? [];
    this.at = 0;
  }
  get done() { return this.at >= this.tokens.length; }
  get next() { return this.tokens[this.at]; }
  skip() { while (!this.done && /^\s/.test(this.next)) this.at++; }
  row(ends, depth) {
    const items = [];
    for (this.skip(); !ends(); this.skip()) {
      if (this.done) throw new Error("open");
      const item = this.scripted(depth);
      if (item) items.push(item);
    }
    return m("mrow", ...items);
  }
  scripted(depth) {
    let base = this.next === "^" || this.next === "_" ? m("mrow") : this.atom(depth);
    const scripts = {};
    for (this.skip(); !this.done && (this.next === "^" || this.next === "_" || this.next === "'"); this.skip()) {
      const kind = this.tokens[this.at++];
      if (kind === "'") {
        scripts["^"] = m("mrow", ...(scripts["^"] ? [scripts["^"]] : []), m("mo", "′"));
        continue;
      }
      if (scripts[kind]) throw new Error("twice");
      scripts[kind] = this.argument(depth);
    }
    if (!base) return null;
    const [up, down] = [scripts["^"], scripts["_"]];
    const big = /^[∑∏]|^(lim|max|min|sup|inf)$/.test(base.textContent);
    if (up && down) return m(big ? "munderover" : "msubsup", base, down, up);
    if (up) return m(big ? "mover" : "msup", base, up);
    return down ? m(big ? "munder" : "msub", base, down) : base;
  }
  argument(depth) {
    this.skip();
    if (this.done) throw new Error("missing");
    return this.atom(depth + 1) ?? m("mrow");
  }
  group() { // the text between braces
    this.skip();
    if (this.next !== "{") return this.tokens[this.at++] ?? "";
    let level = 0;
    let text = "";
    do {
      if (this.done) throw new Error("open");
      const token = this.tokens[this.at++];
      level += token === "{" ? 1 : token === "}" ? -1 : 0;
      if (!(token === "{" && level === 1) && level > 0) text += token.replace(/^\\([%$&#_{} ])$/, "$1");
    } while (level > 0);
    return text;
  }
  atom(depth) {
    if (depth > 40) throw new Error("deep");
    const token = this.tokens[this.at++];
    if (token === "{") {
      const inner = this.row(() => this.next === "}", depth + 1);
      this.at++;
      return inner;
    }
    if (token === "}" || token === "&" || token === "\\\\") throw new Error("stray");
    if (/^\d/.test(token)) return m("mn", token);
    if (/^\p{L}$/u.test(token)) return m("mi", token);
    if (!token.startsWith("\\")) return m("mo", token === "-" ? "−" : token);
    const name = token.slice(1).replace(/\*$/, "");
    if (LETTERS.has(name)) return m("mi", LETTERS.get(name));
    if (OPERATORS.has(name)) return m("mo", OPERATORS.get(name));
    if (NAMED.has(name)) return m("mi", name);
    if (TEXTS.has(name)) return m("mtext", this.group());
    if (SPACES.has(name)) return name.endsWith("quad") ? m("mtext", "\u2003") : null;
    if (["frac", "dfrac", "tfrac", "cfrac"].includes(name)) return m("mfrac", this.argument(depth), this.argument(depth));
    if (name === "binom") return m("mrow", m("mo", "("), m("mfrac", this.argument(depth), this.argument(depth)), m("mo", ")"));
    if (name === "sqrt") {
      this.skip();
      if (this.next !== "[") return m("msqrt", this.argument(depth));
      this.at++;
      const index = this.row(() => this.next === "]", depth + 1);
      this.at++;
      return m("mroot", this.argument(depth), index);
    }
    if (name === "boxed" || name === "underline") {
      const boxed = m("mrow", this.argument(depth));
      boxed.setAttribute("class", "boxed");
      return boxed;
    }
    if (ACCENTS.has(name)) return m("mover", this.argument(depth), m("mo", ACCENTS.get(name)));
    if (name === "left" || name === "right" || name === "middle") {
      this.skip();
      const fence = this.tokens[this.at++] ?? "";
      const sign = OPERATORS.get(fence.slice(1)) ?? fence.replace(/^\\/, "");
      return m("mo", sign === "." ? "" : sign);
    }
    if (name === "begin") return this.matrix(this.group(), depth + 1);
    if (/^[%$&#_{}|]$/.test(name)) return m("mo", name);
    throw new Error("unknown");
  }
  matrix(kind, depth) {
    const fences = { pmatrix: "()", bmatrix: "[]", vmatrix: "||", cases: "{ ", matrix: "  ", array: "  ", aligned: "  ", align: "  ", "align*": "  " }[kind];
    if (!fences) throw new Error("unknown");
    if (kind === "array") this.group();
    const rows = [[]];
    const ends = () => ["&", "\\\\", "\\end"].includes(this.next);
    for (;;) {
      rows.at(-1).push(m("mtd", this.row(ends, depth)));
      const end = this.tokens[this.at++];
      if (end === "\\\\") rows.push([]);
      if (end === "\\end") break;
    }
    this.group();
    const body = m("mtable", ...rows.map((cells) => m("mtr", ...cells)));
    return m("mrow", m("mo", fences[0].trim()), body, m("mo", fences[1].trim()));
  }
}

// Differences

const WORDS = /\s+|[\p{L}\p{N}_]+|[^]/gu;
const CELLS_AT_MOST = 4_000_000;

// The parts of two texts: [text, whether it is in this one alone], by the longest common subsequence of their words.
export function difference(one, other) {
  let left = one.match(WORDS) ?? [];
  let right = other.match(WORDS) ?? [];
  let head = 0;
  while (head < left.length && head < right.length && left[head] === right[head]) head++;
  let tail = 0;
  while (tail < left.length - head && tail < right.length - head && left.at(-1 - tail) === right.at(-1 - tail)) tail++;
  const [before, after] = [left.slice(0, head).join(""), left.slice(left.length - tail).join("")];
  [left, right] = [left, right].map((words) => words.slice(head, words.length - tail));
  const [mine, yours] = [[[before, false]], [[before, false]]];
  const push = (parts, text, alone) => {
    if (parts.at(-1)[1] === alone) parts.at(-1)[0] += text;
    else parts.push([text, alone]);
  };
  const width = right.length + 1;
  const isShort = left.length * right.length <= CELLS_AT_MOST; // of longer ones nothing between head and tail is matched
  const longest = new Uint16Array(isShort ? (left.length + 1) * width : 0);
  for (let i = left.length - 1; i >= 0 && isShort; i--)
    for (let j = right.length - 1; j >= 0; j--)
      longest[i * width + j] = left[i] === right[j]
        ? longest[(i + 1) * width + j + 1] + 1
        : Math.max(longest[(i + 1) * width + j], longest[i * width + j + 1]);
  let [i, j] = [0, 0];
  while (i < left.length || j < right.length) {
    const both = isShort && i < left.length && j < right.length;
    if (both && left[i] === right[j]) {
      push(mine, left[i++], false);
      push(yours, right[j++], false);
    } else if (j < right.length && (i >= left.length || (both && longest[(i + 1) * width + j] < longest[i * width + j + 1]))) {
      push(yours, right[j++], true);
    } else push(mine, left[i++], true);
  }
  push(mine, after, false);
  push(yours, after, false);
  return [mine, yours];
}

export function compared(parts, name) {
  const nodes = parts.map(([text, alone]) => (alone && text ? el("mark", { className: name }, text) : text));
  return el("div", { className: "text raw", dir: "auto" }, ...nodes);
}
