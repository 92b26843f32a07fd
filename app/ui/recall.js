// A picture that is dropped, or chosen, goes to the server as it is, with what is written in it: as text inside the request.
const MOST = 3_200_000;  // bytes that fit through the door
const zone = element.querySelector("label");
const pick = element.querySelector("input");

function take(file) {
  if (!file) return;
  if (file.size > MOST) { trigger("recall", { name: file.name, image: "" }); return; }
  const reader = new FileReader();
  reader.onload = () => trigger("recall", { name: file.name, image: reader.result });
  reader.readAsDataURL(file);
}

pick.addEventListener("change", () => { take(pick.files[0]); pick.value = ""; });
for (const kind of ["dragenter", "dragover"]) zone.addEventListener(kind, (event) => { event.preventDefault(); zone.classList.add("over"); });
for (const kind of ["dragleave", "drop"]) zone.addEventListener(kind, (event) => { event.preventDefault(); zone.classList.remove("over"); });
zone.addEventListener("drop", (event) => take(event.dataTransfer.files[0]));
