// Clicks on the pictures made: recall, star, delete. props.value is the markup of all of them, escaped by the server.
element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-use], [data-star], [data-delete]");
  if (!button) return;
  const { use, star, delete: doomed } = button.dataset;
  if (use) trigger("use", { address: use });
  else if (star) trigger("star", { address: star, on: button.getAttribute("aria-pressed") !== "true" });
  else if (window.confirm("Delete this picture from the disk?")) trigger("remove", { address: doomed });
});
