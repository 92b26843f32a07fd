// The pictures that control. props.sources: what can read one, [{key, title, annotator}]; props.annotators: [{key, about}];
// props.drawn: what the server drew of one, {turn, picture, trouble}; props.value: [{source, image, annotator, strength, start, end}].
// A picture is shrunk here and travels as text inside the request: nothing is uploaded. Names of files become text nodes.
const SIDE = 1024, HEAVY = 600_000, MOST = 700_000, FILE = 200_000_000;  // pixels; bytes as PNG, at all, of a file that is opened
const list = element.querySelector(".list");
const pick = element.querySelector("input[type=file]");
const zone = element.querySelector(".drop");
const said = element.querySelector(".said");
const rows = [];  // {id, name, image, source, annotator, strength, start, end, parts}
let count = 0;

function tell() {
  props.value = rows.map(({ source, image, annotator, strength, start, end }) => ({ source, image, annotator, strength, start, end }));
  element.querySelector(".count").textContent = rows.length ? `${rows.length} in use` : "";
  zone.hidden = rows.length >= (props.most ?? 4) || !(props.sources ?? []).length;
}

function blob(canvas, type, quality) {
  return new Promise((done) => canvas.toBlob(done, type, quality));
}

async function encoded(bitmap, side) {  // small enough: lines and flat colours stay exact, photos become WebP (JPEG where a browser has none)
  const scale = Math.min(1, side / Math.max(bitmap.width, bitmap.height));
  const canvas = make("canvas", { width: Math.max(1, Math.round(bitmap.width * scale)), height: Math.max(1, Math.round(bitmap.height * scale)) });
  const pen = canvas.getContext("2d");
  pen.imageSmoothingQuality = "high";
  pen.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  let best = await blob(canvas, "image/png");
  if (best.size > HEAVY) {
    const photo = await blob(canvas, "image/webp", 0.95);
    if (photo.type === "image/webp") best = photo;
    else if (!pen.getImageData(0, 0, canvas.width, canvas.height).data.some((level, at) => at % 4 === 3 && level < 255)) best = await blob(canvas, "image/jpeg", 0.95);
  }
  return best.size <= MOST ? best : encoded(bitmap, 0.75 * Math.max(canvas.width, canvas.height));
}

async function text(file) {
  const bitmap = await createImageBitmap(file);  // upright, by the turn that the camera wrote
  const data = await encoded(bitmap, SIDE);
  bitmap.close();
  return new Promise((done, fail) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result.replace(";base64,", `;name=${encodeURIComponent(file.name).slice(0, 300)};base64,`));
    reader.onerror = fail;
    reader.readAsDataURL(data);
  });
}

async function add(files) {
  said.textContent = "";
  for (const file of files) {
    if (rows.length >= (props.most ?? 4)) { said.textContent = `${props.most ?? 4} pictures at most`; return; }
    try {
      if (file.size > FILE) throw new Error("large");
      const image = await text(file);
      const [first] = props.sources ?? [];
      if (!first) return;
      const row = { id: ++count, name: file.name, image, source: first.key, annotator: null, strength: 1, start: 0, end: 1 };
      rows.push(row);
      list.append(show(row));
      look(row);
      tell();
    } catch {
      said.textContent = `${file.name} cannot be read as a picture: take a PNG, JPEG or WebP file`;
    }
  }
}

function named(key) {
  return (props.sources ?? []).find((source) => source.key === key);
}

const waiting = [];  // rows whose picture is to be drawn: one is asked for at a time, so that no answer overtakes another
let asked = null, turn = 0, patience = 0;

function look(row) {
  row.parts.drawn.removeAttribute("src");
  row.parts.trouble.textContent = "";
  if (!waiting.includes(row)) waiting.push(row);
  if (!asked) ask();
}

function ask() {
  clearTimeout(patience);
  asked = waiting.shift() ?? null;
  if (!asked) return;
  patience = setTimeout(ask, 20_000);
  trigger("look", { turn: ++turn, image: asked.image, annotator: asked.annotator ?? named(asked.source)?.annotator ?? "" });
}

function choices(row) {  // what makes the condition: as its reader was trained, the picture itself, or by choice
  const usual = named(row.source)?.annotator;
  const options = [["usual", usual ? `as trained (${usual})` : "as it is"], ...(usual ? [["", "as it is"]] : []),
                   ...(props.annotators ?? []).map(({ key, about }) => [key, `${key}: ${about}`])];
  row.parts.annotator.replaceChildren(...options.map(([value, words]) => make("option", { value: value || "none" }, words)));
  row.parts.annotator.value = row.annotator === null ? "usual" : row.annotator || "none";
}

function number(row, label, value, limits, change) {
  const box = make("input", { type: "number", ...limits, value, "aria-label": label,
    oninput: () => { if (box.value !== "" && box.checkValidity()) { change(box.valueAsNumber); tell(); } } });
  return box;
}

function show(row) {
  const what = `of ${row.name}`, limits = { min: 0, max: 2, step: 0.05 };
  const drawn = make("img", { class: "drawn", alt: `what the annotator makes ${what}` });
  const trouble = make("p", { class: "trouble", role: "alert" });
  const source = make("select", { "aria-label": `What reads ${row.name}`, onchange: () => { row.source = source.value; row.annotator = null; choices(row); look(row); tell(); } },
    ...(props.sources ?? []).map(({ key, title }) => make("option", { value: key }, title)));
  const annotator = make("select", { "aria-label": `Annotator ${what}`, onchange: () => {
    row.annotator = annotator.value === "usual" ? null : annotator.value === "none" ? "" : annotator.value; look(row); tell(); } });
  const slide = make("input", { type: "range", ...limits, value: 1, "aria-label": `Strength ${what}`, oninput: () => { box.value = slide.value; row.strength = slide.valueAsNumber; tell(); } });
  const box = number(row, `Strength ${what} as a number`, 1, limits, (value) => { slide.value = value; row.strength = value; });
  const percent = { min: 0, max: 100, step: 5 };
  row.parts = { drawn, trouble, annotator };
  choices(row);
  const whole = make("article", { class: "control", "data-id": row.id },
    make("div", { class: "pair" }, make("img", { src: row.image, alt: row.name }), make("span", { "aria-hidden": "true" }, "→"), drawn),
    make("div", { class: "fields" },
      make("div", { class: "top" }, make("strong", {}, row.name), make("button", { type: "button", "aria-label": `Remove ${row.name}`, title: "Remove", onclick: () => {
        rows.splice(rows.indexOf(row), 1); whole.remove(); tell(); } }, "×")),
      source, annotator,
      make("div", { class: "strength" }, make("span", {}, "Strength"), slide, box),
      make("div", { class: "times" }, make("span", {}, "On from"), number(row, `Start ${what} in percent`, 0, percent, (value) => { row.start = value / 100; }),
        make("span", {}, "to"), number(row, `End ${what} in percent`, 100, percent, (value) => { row.end = value / 100; }), make("span", {}, "% of the steps")),
      trouble));
  return whole;
}

watch("drawn", () => {
  if (!asked || props.drawn?.turn !== turn) return;
  if (!waiting.includes(asked)) {
    if (props.drawn.picture) asked.parts.drawn.src = props.drawn.picture;
    asked.parts.trouble.textContent = props.drawn.trouble;
  }
  ask();
});
watch("sources", () => {
  for (const row of [...rows]) if (!named(row.source)) { rows.splice(rows.indexOf(row), 1); list.querySelector(`[data-id="${row.id}"]`)?.remove(); }
  element.querySelector(".none").hidden = Boolean((props.sources ?? []).length);
  tell();
});

pick.addEventListener("change", () => { add([...pick.files]); pick.value = ""; });
for (const kind of ["dragenter", "dragover"]) zone.addEventListener(kind, (event) => { event.preventDefault(); zone.classList.add("over"); });
for (const kind of ["dragleave", "drop"]) zone.addEventListener(kind, (event) => { event.preventDefault(); zone.classList.remove("over"); });
zone.addEventListener("drop", (event) => add([...event.dataTransfer.files]));
element.querySelector(".none").hidden = Boolean((props.sources ?? []).length);
tell();
