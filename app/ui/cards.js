// The cards of the LoRAs. props.cards: what the library knows of each; props.value: those chosen, [{key, weight}], in the
// order of choosing. Words from files become text nodes, never markup.
const grid = element.querySelector(".cards");
const find = element.querySelector(".find");
const count = element.querySelector(".count");
const suggested = element.querySelector(".suggested");
const weights = new Map();  // key to weight, kept while a card is not chosen
const chosen = new Set();

function make(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== false) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function tell() {
  props.value = [...chosen].map((key) => ({ key, weight: weights.get(key) ?? 1 }));
  filter();
  suggest();
}

function weigh(card) {
  const limits = { min: -1, max: 2, step: 0.05, value: weights.get(card.key) ?? 1, "aria-label": `Weight of ${card.title}` };
  const slide = make("input", { type: "range", ...limits });
  const box = make("input", { type: "number", ...limits, "aria-label": `Weight of ${card.title} as a number` });
  const set = (value) => {
    if (!Number.isFinite(value)) return;
    weights.set(card.key, Math.min(2, Math.max(-1, value)));
    tell();
  };
  slide.addEventListener("input", () => { box.value = slide.value; set(slide.valueAsNumber); });
  box.addEventListener("input", () => { if (box.value !== "") { slide.value = box.value; set(box.valueAsNumber); } });
  box.addEventListener("change", () => { box.value = weights.get(card.key) ?? 1; slide.value = box.value; });
  return make("div", { class: "weight" }, slide, box);
}

function show(card) {
  const name = `lora-${card.key}`;
  const picture = card.preview ? make("img", { src: card.preview, alt: "" })
    : make("span", { class: "letter", "aria-hidden": "true" }, [...card.title][0]?.toUpperCase() ?? "?");
  const use = make("input", {
    type: "checkbox", id: name, "aria-label": `Use ${card.title}`, disabled: card.trouble ? "" : false,
    onchange: () => {
      if (use.checked) chosen.add(card.key); else chosen.delete(card.key);
      whole.classList.toggle("chosen", use.checked);
      tell();
    },
  });
  use.checked = chosen.has(card.key);
  const words = card.triggers.slice(0, 8).map((word) => make("button", {
    type: "button", class: "chip", title: "Add to the prompt", "aria-label": `Add “${word}” to the prompt`,
    onclick: () => trigger("word", { word }),
  }, word));
  const whole = make("article", { class: "card", "data-key": card.key },
    make("label", { class: "head", for: name }, picture,
      make("span", { class: "name", title: card.title }, make("strong", {}, card.title), make("small", {}, card.trouble || card.category || "LoRA")),
      use),
    make("div", { class: "chips" }, ...words),
    weigh(card));
  whole.classList.toggle("chosen", use.checked);
  whole.classList.toggle("trouble", Boolean(card.trouble));
  whole.words = [card.title, card.key, card.category, ...card.triggers].join(" ").toLowerCase();
  return whole;
}

function filter() {  // a chosen card stays in sight
  const wanted = find.value.trim().toLowerCase();
  for (const card of grid.children) card.hidden = !(card.words.includes(wanted) || chosen.has(card.dataset.key));
  const all = grid.children.length;
  count.textContent = all ? `${chosen.size} of ${all} in use` : "none found";
}

function draw() {
  const cards = props.cards ?? [];
  for (const key of [...chosen]) if (!cards.some((card) => card.key === key && !card.trouble)) chosen.delete(key);
  grid.replaceChildren(...cards.map(show));
  tell();
}

function suggest() {  // what the prompt calls for and is not chosen yet
  const fresh = (props.suggested ?? []).filter((each) => !chosen.has(each.key) && (props.cards ?? []).some((card) => card.key === each.key));
  suggested.replaceChildren(...(fresh.length ? [make("span", {}, "Suggested:")] : []), ...fresh.map((each) => make("button", {
    type: "button", class: "chip", title: each.why, "aria-label": `Use ${each.title}: ${each.why}`,
    onclick: () => {
      if (!weights.has(each.key)) weights.set(each.key, each.weight);
      chosen.add(each.key);
      draw();
      if (each.word) trigger("word", { word: each.word });
    },
  }, each.title)));
}

find.addEventListener("input", filter);
watch("cards", draw);
watch("suggested", suggest);
draw();
