// What was said of the last file goes when the next one is chosen, also where that one is refused and never shown.
// Gradio says "Error" of a file that is too large, and no more. MEGABYTES is the most that the server takes.

const megabytes = (file) => file.size / 2 ** 20;

for (const chosen of ["change", "drop"]) {
  document.addEventListener(chosen, (event) => {
    if (!event.target.closest("#upload")) return;
    const [file] = event.target.files ?? event.dataTransfer?.files ?? [];
    props.value = file && megabytes(file) > MEGABYTES
      ? `<p class="dvt-notice" role="alert">This file: ${Math.ceil(megabytes(file))} MB; the most that is taken is MEGABYTES.</p>`
      : "";
  }, true);
}
