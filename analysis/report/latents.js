// Cards of latents: one for each of the choice that is shown, made when it is chosen.

const latents = payload.latents;
const cards = new Map(latents.cards.map((card) => [card.latent, card]));
const box = document.getElementById("cards");
const readout = document.getElementById("readout");
const FIRST = 5;
const digits = (value) => (value === null ? "-" : Number(value.toPrecision(4)).toString());
const visible = (token) => token.replaceAll("\n", "⏎").replaceAll("\t", "⇥");

function percent(value) {
  return `${Number((100 * value).toPrecision(3))} %`;
}

function text(context, most) {
  const line = element("div", { className: "text", tabIndex: 0 });
  line.setAttribute("role", "group");
  line.setAttribute("aria-label", context.tokens.join(""));
  context.tokens.forEach((token, i) => {
    const value = context.values[i];
    const span = element("span", { className: i === context.peak ? "peak" : "" });
    for (const part of visible(token).split(/([⏎⇥])/)) span.append(/[⏎⇥]/.test(part) ? element("i", { textContent: part }) : part);
    if (value > 0) span.style.backgroundColor = `rgba(var(--mark), ${(0.08 + 0.5 * Math.min(value / most, 1)).toFixed(3)})`;
    span.dataset.value = value;
    line.append(span);
  });
  return line;
}

function point(line, span) {
  line.querySelector(".here")?.classList.remove("here");
  readout.hidden = !span;
  if (!span) return;
  span.classList.add("here");
  readout.textContent = `“${span.textContent}”  ${digits(Number(span.dataset.value))}`;
}

box.addEventListener("mouseover", (event) => {
  const span = event.target.closest(".text span");
  if (span) point(span.parentElement, span);
});
box.addEventListener("mouseout", (event) => {
  const line = event.target.closest(".text");
  if (line) point(line, null);
});
box.addEventListener("focusin", (event) => {
  if (event.target.className === "text") point(event.target, event.target.querySelector(".peak"));
});
box.addEventListener("focusout", (event) => {
  if (event.target.className === "text") point(event.target, null);
});
box.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step || event.target.className !== "text") return;
  event.preventDefault();
  const spans = [...event.target.children];
  const here = spans.findIndex((span) => span.classList.contains("here"));
  point(event.target, spans[Math.min(Math.max(here + step, 0), spans.length - 1)]);
});

function fact(words, value) {
  return element("span", {}, `${words} `, element("b", { textContent: value }));
}

function cardOf(card) {
  const made = element("article", { className: "card", id: `latent-${card.latent}`, tabIndex: -1 });
  made.setAttribute("aria-label", `Latent ${card.latent}`);
  const top = element("div", { className: "top" }, element("h3", { textContent: `Latent ${card.latent}` }));
  const about = element("p", { className: "about" });
  const facts = [
    fact("fires on", card.density ? `${percent(card.density)}` : "no token"),
    fact("mean", digits(card.mean_activation)),
    fact("largest", digits(card.max_activation)),
    fact("nested group", card.group ?? "-"),
  ];
  facts.forEach((part, i) => about.append(i ? " · " : "", part));
  top.append(about);
  made.append(top);
  if (card.peaks.length) {
    const chips = element("p", { className: "chips" }, "Peaks on");
    card.peaks.forEach(([token, n]) => chips.append(element("span", { className: "chip" }, element("code", { textContent: visible(token).replaceAll(" ", "␣") }), ` ×${n}`)));
    made.append(chips);
  }
  if (card.near.length) {
    const chips = element("p", { className: "chips" }, "Nearest decoder rows");
    card.near.forEach(([other, cosine]) => {
      const words = `${other} (${cosine.toFixed(2)})`;
      if (!cards.has(other)) return chips.append(element("span", { className: "chip", textContent: words }));
      const button = element("button", { type: "button", className: "chip", textContent: words });
      button.addEventListener("click", () => visit(other));
      chips.append(button);
    });
    made.append(chips);
  }
  if (!card.contexts.length) {
    made.append(element("p", { className: "about", textContent: card.density ? "No context is stored." : "It fires on no held-out token." }));
    return made;
  }
  const most = card.max_activation ?? Math.max(...card.contexts.map((context) => context.values[context.peak]));
  const list = element("ol", { className: "contexts" });
  const add = (contexts) => contexts.forEach((context) => list.append(
    element("li", {}, element("span", { className: "value", textContent: digits(context.values[context.peak]) }), text(context, most))));
  add(card.contexts.slice(0, FIRST));
  made.append(list);
  const rest = card.contexts.slice(FIRST);
  if (rest.length) {
    const button = element("button", { type: "button", className: "chip", textContent: `${rest.length} more` });
    button.addEventListener("click", () => {
      const next = list.children.length;
      add(rest);
      list.children[next].querySelector(".text").focus();
      button.remove();
    });
    made.append(element("p", { className: "chips" }, button));
  }
  return made;
}

function choice() {
  return document.querySelector("input[name=choice]:checked").value;
}

function showCards() {
  const words = document.getElementById("find").value.toLowerCase();
  const chosen = latents.chosen[choice()].map((latent) => cards.get(latent));
  const found = chosen.filter((card) => !words || card.contexts.some((context) => context.tokens.join("").toLowerCase().includes(words)));
  box.replaceChildren(...found.map(cardOf));
  document.getElementById("found").textContent = words ? `${found.length} of ${chosen.length} latents` : "";
}

function visit(latent) {
  if (!document.getElementById(`latent-${latent}`)) {
    const holds = Object.keys(latents.chosen).find((name) => latents.chosen[name].includes(latent));
    document.querySelector(`input[name=choice][value=${holds}]`).checked = true;
    document.getElementById("find").value = "";
    showCards();
  }
  const card = document.getElementById(`latent-${latent}`);
  card.scrollIntoView({ block: "start" });
  card.focus();
}

document.querySelectorAll("input[name=choice]").forEach((input) => input.addEventListener("change", showCards));
document.getElementById("find").addEventListener("input", showCards);
showCards();
