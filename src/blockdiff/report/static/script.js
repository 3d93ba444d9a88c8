"use strict";

/* A decoding trace as a player: the tokens before the open block, the block at one of its steps, and last the text. */
function player(trace) {
  const { tokens, frames } = JSON.parse(trace.querySelector("script").textContent);
  const last = frames.length;
  let at = 0;
  let timer = null;

  const make = (name, properties = {}, parent = null) => {
    const element = Object.assign(document.createElement(name), properties);
    if (parent) parent.append(element);
    return element;
  };
  const stage = make("p", { className: "text stage", tabIndex: 0 });
  stage.setAttribute("aria-label", "the text at one step; arrow keys go on and back");
  const controls = make("div", { className: "controls" });
  const button = (text, action) => {
    const made = make("button", { type: "button", textContent: text }, controls);
    made.addEventListener("click", action);
    return made;
  };
  button("Previous", () => go(at - 1));
  const play = button("Play", () => (timer ? stop() : start()));
  button("Next", () => go(at + 1));
  const slider = make("input", { type: "range", min: 0, max: last, value: 0 }, controls);
  slider.setAttribute("aria-label", "step");
  slider.addEventListener("input", () => go(Number(slider.value)));
  const status = make("output", {}, controls);

  function token(text, step, isNew = false) {
    const span = make("span", { className: `token step-${Math.min(step, 12)}`, textContent: text }, stage);
    span.title = `step ${step}`;
    span.classList.toggle("new", isNew);
  }

  function show() {
    stage.replaceChildren();
    make("i", { className: "prompt", textContent: trace.dataset.prompt }, stage);
    const frame = frames[at];
    const before = frame ? frame.start : tokens.length;
    for (const { text, step } of tokens.slice(0, before)) token(text, step);
    let masks = 0;
    (frame ? frame.tokens : []).forEach((text, place) => {
      if (text === null) {
        masks += 1;
        make("span", { className: "mask", title: "mask" }, stage).setAttribute("aria-label", "mask");
        return;
      }
      const previous = frames[at - 1];
      const known = previous && previous.start === frame.start ? previous.tokens[place] : null;
      const step = tokens[frame.start + place]?.step ?? frame.step;
      token(text, Math.min(step, frame.step), frame.step > 0 && known === null);
    });
    slider.value = at;
    status.textContent = frame
      ? `${at + 1} of ${last + 1}: block from token ${frame.start + 1}, step ${frame.step}, masks left: ${masks}`
      : `${at + 1} of ${last + 1}: the whole text, ${tokens.length} tokens`;
  }

  function go(to) {
    at = Math.max(0, Math.min(last, to));
    if (at === last) stop();
    show();
  }

  function start() {
    if (at === last) go(0);
    play.textContent = "Pause";
    timer = setInterval(() => go(at + 1), 500);
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  }

  const keys = { ArrowRight: () => at + 1, ArrowLeft: () => at - 1, Home: () => 0, End: () => last };
  trace.addEventListener("keydown", (event) => {
    if (event.target === slider || !(event.key in keys)) return;
    event.preventDefault();
    stop();
    go(keys[event.key]());
  });

  trace.querySelector(".static").before(stage, controls);
  trace.classList.add("stepping");
  show();
}

for (const trace of document.querySelectorAll(".trace")) player(trace);
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
