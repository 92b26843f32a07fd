// The LoRAs of a picture, a row each, above all those that could be added. props.cards: what the library knows of each;
// props.value: the rows, [{key, weight, on, binds, blocks}], in their order; props.recalled: {turn, rows}, rows that the server sets;
// props.presets: parts of the model that a LoRA may be kept to, [{key, title}]; props.suggested: what the prompt calls for.
const list = element.querySelector(".rows");
const grid = element.querySelector(".cards");
const find = element.querySelector(".find");
const count = element.querySelector(".count");
const suggested = element.querySelector(".suggested");
const clamp = (value) => Math.min(2, Math.max(-1, value));
const weights = new Map();  // key to weight, kept while a LoRA is not in use
let rows = [];

const card = (key) => (props.cards ?? []).find((each) => each.key === key);
const fresh = (key, more = {}) => ({ key, weight: weights.get(key) ?? 1, on: true, binds: "", blocks: "", ...more });

function tell() {
  for (const row of rows) weights.set(row.key, row.weight);
  props.value = rows.map(({ key, weight, on, binds, blocks }) => ({ key, weight, on, binds, blocks }));
  const all = (props.cards ?? []).length, used = rows.filter((row) => row.on).length;
  count.textContent = all ? `${used} of ${all} in use` : "none found: put .safetensors files into a LoRA folder";
  suggest();
}

function add(key, more) {
  if (rows.some((row) => row.key === key)) return;
  rows.push(fresh(key, more));
  draw();
}

function remove(key) {
  rows = rows.filter((row) => row.key !== key);
  draw();
}

function picture(of) {
  return of.preview ? make("img", { src: of.preview, alt: "" })
    : make("span", { class: "letter", "aria-hidden": "true" }, [...of.title][0]?.toUpperCase() ?? "?");
}

function weigh(row, title) {
  const limits = { min: -1, max: 2, step: 0.05, value: row.weight };
  const slide = make("input", { type: "range", ...limits, "aria-label": `Weight of ${title}` });
  const box = make("input", { type: "number", ...limits, "aria-label": `Weight of ${title} as a number` });
  const set = (value) => { if (Number.isFinite(value)) { row.weight = clamp(value); tell(); } };
  slide.addEventListener("input", () => { box.value = slide.value; set(slide.valueAsNumber); });
  box.addEventListener("input", () => { if (box.value !== "") { slide.value = box.value; set(box.valueAsNumber); } });
  box.addEventListener("change", () => { box.value = row.weight; slide.value = row.weight; });
  return make("div", { class: "weight" }, slide, box);
}

function button(row, title, sign, what, act, more = {}) {
  return make("button", { type: "button", "aria-label": `${what} ${title}`, title: what, "data-act": what, onclick: act, ...more }, sign);
}

function move(row, by) {
  const at = rows.indexOf(row);
  rows.splice(at, 1);
  rows.splice(at + by, 0, row);
  draw();
  const whole = list.children[at + by];
  (whole.querySelector(`[data-act="${by < 0 ? "Move up" : "Move down"}"]:not([disabled])`) ?? whole.querySelector("button")).focus();
}

function show(row, at) {
  const of = card(row.key), title = of.title;
  const on = make("input", { type: "checkbox", "aria-label": `${title} is on`, title: "Off keeps its weight", onchange: () => {
    row.on = on.checked; whole.classList.toggle("off", !row.on); tell(); } });
  on.checked = row.on;
  const words = of.triggers.slice(0, 8).map((word) => make("button", {
    type: "button", class: "chip", title: `Add to the prompt (${of.origin})`, "aria-label": `Add “${word}” to the prompt`,
    onclick: () => trigger("word", { word }) }, word));
  const binds = make("input", { type: "text", maxlength: 200, value: row.binds, placeholder: ["style", "place"].includes(of.category) ? "everywhere" : of.triggers[0] ?? "words of the prompt",
    "aria-label": `${title} belongs to`, oninput: () => { row.binds = binds.value; tell(); } });
  const blocks = make("select", { "aria-label": `Blocks of ${title}`, onchange: () => { row.blocks = blocks.value; tell(); } },
    ...(props.presets ?? []).map(({ key, title: words }) => make("option", { value: key }, words)));
  blocks.value = row.blocks;
  const whole = make("article", { class: "lora", "data-key": row.key },
    make("div", { class: "head" }, on, picture(of), make("span", { class: "name", title }, make("strong", {}, title), make("small", {}, of.category || "LoRA")),
      button(row, title, "↑", "Move up", () => move(row, -1), { disabled: at === 0 ? "" : false }),
      button(row, title, "↓", "Move down", () => move(row, 1), { disabled: at === rows.length - 1 ? "" : false }),
      button(row, title, "×", "Remove", () => { remove(row.key); find.focus(); })),
    weigh(row, title),
    make("div", { class: "words" }, ...words,
      make("label", { class: "binds", title: "The words of the prompt that this LoRA draws. Methods that give each LoRA its own place read it." }, "belongs to", binds),
      ...((props.presets ?? []).length > 1 ? [make("label", { class: "blocks", title: "The part of the model that it changes" }, "in", blocks)] : [])));
  whole.classList.toggle("off", !row.on);
  return whole;
}

function tile(of) {
  const use = make("input", { type: "checkbox", "aria-label": `Use ${of.title}`, disabled: of.trouble ? "" : false,
    onchange: () => (use.checked ? add(of.key) : remove(of.key)) });
  const whole = make("label", { class: "card", "data-key": of.key, title: of.trouble || [of.title, ...of.triggers].join(", ") },
    use, picture(of), make("span", { class: "name" }, make("strong", {}, of.title), make("small", {}, of.trouble || of.category || "LoRA")));
  whole.classList.toggle("trouble", Boolean(of.trouble));
  whole.words = [of.title, of.key, of.category, ...of.triggers].join(" ").toLowerCase();
  return whole;
}

function mark() {
  for (const each of grid.children) {
    const used = rows.some((row) => row.key === each.dataset.key);
    each.classList.toggle("chosen", used);
    each.querySelector("input").checked = used;
  }
}

function filter() {
  const wanted = find.value.trim().toLowerCase().split(/\s+/);
  for (const each of grid.children) each.hidden = !wanted.every((word) => each.words.includes(word));
}

function draw() {
  rows = rows.filter((row) => card(row.key) && !card(row.key).trouble);
  list.replaceChildren(...rows.map(show));
  mark();
  tell();
}

function suggest() {  // what the prompt calls for and is not in use yet, with the reason
  const open = (props.suggested ?? []).filter((each) => card(each.key) && !rows.some((row) => row.key === each.key));
  suggested.replaceChildren(...(open.length ? [make("span", {}, "Suggested:")] : []), ...open.map((each) => make("button", {
    type: "button", class: "chip", title: each.why, "aria-label": `Use ${each.title}: ${each.why}`,
    onclick: () => {
      add(each.key, weights.has(each.key) ? {} : { weight: clamp(each.weight) });
      if (each.word) trigger("word", { word: each.word });
    } }, make("b", {}, each.title), make("small", {}, each.why.split(";")[0]))));
}

function fill() {
  grid.replaceChildren(...(props.cards ?? []).map(tile));
  filter();
  draw();
}

function recall() {
  rows = (props.recalled?.rows ?? []).map((row) => fresh(row.key, row));
  draw();
}

const zone = element.querySelector(".drop");
const said = element.querySelector(".said");
let awaited = [];  // names of dropped files whose cards are to come

async function take(files) {
  for (const file of files) {
    said.textContent = `Reading ${file.name} …`;
    said.classList.remove("trouble");
    let answer;
    try {
      answer = await (await fetch(`dropped/${encodeURIComponent(file.name)}`, { method: "POST", body: file })).json();
    } catch {
      answer = { trouble: `${file.name} could not be sent` };
    }
    said.textContent = answer.trouble ?? answer.receipt;
    said.classList.toggle("trouble", "trouble" in answer);
    if (answer.name) { awaited.push(answer.name); trigger("dropped", {}); }
  }
}

function arrive() {  // a dropped LoRA is in use as soon as its card is there
  fill();
  for (const name of awaited.splice(0)) {
    const keys = (props.cards ?? []).map((each) => each.key).filter((key) => key === name || key.startsWith(`${name} (`));
    if (keys.length) add(keys.at(-1)); else awaited.push(name);
  }
}

const pick = zone.querySelector("input");
pick.addEventListener("change", () => { take([...pick.files]); pick.value = ""; });
for (const kind of ["dragenter", "dragover"]) zone.addEventListener(kind, (event) => { event.preventDefault(); zone.classList.add("over"); });
for (const kind of ["dragleave", "drop"]) zone.addEventListener(kind, (event) => { event.preventDefault(); zone.classList.remove("over"); });
zone.addEventListener("drop", (event) => take([...event.dataTransfer.files]));
find.addEventListener("input", filter);
watch("cards", arrive);
watch("suggested", suggest);
watch("recalled", recall);
rows = (props.value ?? []).map((row) => fresh(row.key, row));
fill();
