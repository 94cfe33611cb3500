// Runs once for each HTML part of the page. `element`, `trigger` and `watch` are what Gradio gives to it.

function divide(bar) { // whole columns of patches: none is seen in both states
  const { style, classList } = bar.parentElement;
  const [value, end] = [Number(bar.value), Number(bar.max)];
  style.setProperty("--at", `${(100 * value) / end}%`);
  classList.toggle("dvt-off", value === end);
  classList.toggle("dvt-on", value === 0);
}

function flip() { // the whole map, on and then off, in place
  const bar = element.querySelector(".dvt-bar");
  if (!bar) return;
  bar.value = Number(bar.value) === 0 ? bar.max : 0;
  divide(bar);
}

element.addEventListener("input", (event) => {
  if (event.target.matches(".dvt-bar")) divide(event.target);
});
element.addEventListener("click", (event) => {
  if (event.target.closest(".dvt-toggle")) flip();
});
document.addEventListener("keydown", (event) => {
  const typing = event.target.closest?.("input:not([type=range]), textarea, [contenteditable]");
  if (event.key === "t" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) flip();
});

const maps = () => [...element.querySelectorAll(".dvt-pick")];
let used = -1; // the picture that has the focus, which must have it again after its part is drawn anew

function pick(map, row, column) {
  const { rows, columns } = map.dataset;
  row = Math.max(0, Math.min(rows - 1, row));
  column = Math.max(0, Math.min(columns - 1, column));
  const section = map.closest("section").style; // the frame moves at once, the maps follow
  section.setProperty("--row", row);
  section.setProperty("--column", column);
  used = maps().indexOf(map);
  trigger("select", { row, column });
}

element.addEventListener("click", (event) => {
  const map = event.target.closest(".dvt-pick");
  if (!map) return;
  const box = map.getBoundingClientRect();
  const { rows, columns } = map.dataset;
  const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  pick(map, Math.floor(y * rows), Math.floor(x * columns));
});

const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
element.addEventListener("keydown", (event) => {
  const map = event.target.closest(".dvt-pick");
  if (!map || !STEPS[event.key]) return;
  event.preventDefault();
  const place = map.closest("section").style;
  const [row, column] = ["--row", "--column"].map((name) => Number(place.getPropertyValue(name)));
  pick(map, row + STEPS[event.key][0], column + STEPS[event.key][1]);
});

document.addEventListener("focusin", (event) => {
  if (!element.contains(event.target)) used = -1;
});
watch("value", () => {
  if (used >= 0 && document.activeElement === document.body) maps()[used]?.focus({ preventScroll: true });
});
