// What was said of the last file goes when the next one is chosen, also where that is refused before it is sent.

for (const chosen of ["change", "drop"]) {
  document.addEventListener(chosen, (event) => {
    if (event.target.closest("#upload") && props.value) props.value = "";
  }, true);
}
