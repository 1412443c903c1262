// The server renders every result. This script adds uploads, and results while labels are typed.
"use strict";
const $ = (id) => document.getElementById(id);
let upload = null, newest, typing;

async function ask() {
  const mine = (newest = {});
  const query = new URLSearchParams(new FormData($("form")));
  if (upload) query.delete("q");
  let answer = ["The server does not respond. Is clip-lightning app still running?"];
  try {
    const response = await fetch(`?${query}`, upload && { method: "POST", body: upload });
    const text = await response.text();
    answer = new DOMParser().parseFromString(text, "text/html").getElementById("answer")?.childNodes ?? [text];
  } catch {}
  if (mine === newest) $("answer").replaceChildren(...answer);
}

function searchByImage(file) {
  if (!file) return;
  upload = file;
  $("q").value = "";
  $("image")?.remove();
  $("given").hidden = $("given").disabled = false;
  $("preview").src = URL.createObjectURL(file);
  history.replaceState(null, "", location.pathname);
  ask();
}

$("form").onsubmit = (event) => {
  if (!upload || $("q").value.trim()) return;
  event.preventDefault();
  ask();
};
$("k").onchange = () => $("form").requestSubmit();
$("labels").oninput = () => { clearTimeout(typing); typing = setTimeout(ask, 300); };
$("templates").onchange = ask;
$("file").onchange = ({ target }) => { searchByImage(target.files[0]); target.value = ""; };
document.ondragover = (event) => event.preventDefault();
document.ondrop = (event) => { event.preventDefault(); searchByImage(event.dataTransfer.files[0]); };
document.onpaste = (event) => searchByImage(event.clipboardData.files[0]);
