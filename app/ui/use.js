// A click on "Use this", or on another button with data-use, says which picture it belongs to.
element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-use]");
  if (button) trigger("use", { address: button.dataset.use });
});
