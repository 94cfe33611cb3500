// Runs once for each HTML part of the page. `element`, `trigger` and `watch` are what Gradio gives to it.

element.addEventListener("input", (event) => {
  if (event.target.matches(".dvt-bar")) event.target.parentElement.style.setProperty("--at", `${event.target.value}%`);
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
