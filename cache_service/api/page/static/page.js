// Live figures, local times, buttons that copy, and arrow keys. The pages work without this file, too.

const REDRAW_MS = 10_000; // how often the pictures are fetched again while a build runs
const status = document.getElementById("live");

function show(figures) {
  for (const [id, text] of Object.entries(figures.shown)) {
    const element = document.getElementById(id);
    if (element && element.textContent !== text) element.textContent = text;
  }
  for (const [id, fraction] of Object.entries(figures.progress)) {
    const element = document.getElementById(id);
    if (element) element.value = fraction;
  }
}

// Times are in UTC without this script.
function showLocalTimes(root) {
  const now = new Date();
  for (const element of root.querySelectorAll("time")) {
    const at = new Date(element.dateTime);
    const year = at.getFullYear() === now.getFullYear() ? undefined : "numeric";
    element.title = at.toLocaleString();
    element.textContent = at.toLocaleString("en-GB", {
      day: "numeric", month: "short", year, hour: "2-digit", minute: "2-digit", hour12: false,
    });
  }
}

async function redraw() {
  const answer = await fetch(location.pathname, { headers: { Accept: "text/html" } });
  if (!answer.ok) return;
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const section of document.querySelectorAll("[data-live]")) {
    if (section.contains(document.activeElement)) continue; // focus stays where it is
    const other = fresh.querySelector(`[data-live="${section.dataset.live}"]`);
    if (!other) continue;
    const opened = [...section.querySelectorAll("details[open]")].map((each) => each.dataset.key);
    section.replaceWith(document.adoptNode(other));
    for (const each of other.querySelectorAll("details")) each.open = opened.includes(each.dataset.key);
    showLocalTimes(other);
  }
}

function watchEvents() {
  let structure = status.dataset.structure;
  let drawn = Date.now();
  let source = null;

  function setStatus(text, on) {
    status.hidden = false;
    status.textContent = text;
    status.classList.toggle("on", on);
  }

  function open() {
    source = new EventSource(status.dataset.events);
    source.onopen = () => setStatus("live", true);
    source.onerror = () => setStatus("not connected", false);
    source.onmessage = async (event) => {
      const figures = JSON.parse(event.data);
      const changed = structure !== figures.structure;
      const stale = figures.active !== "0" && Date.now() - drawn > REDRAW_MS;
      structure = figures.structure;
      if (changed || stale) {
        drawn = Date.now();
        await redraw().catch(() => setStatus("not connected", false));
      }
      show(figures);
    };
  }

  document.addEventListener("visibilitychange", () => {
    source?.close();
    if (!document.hidden) open();
  });
  open();
}

function onKey(event) {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.target.closest("input, select, textarea, summary, [tabindex]")) return;
  const key = (event.shiftKey ? "Shift+" : "") + event.key;
  const link = document.querySelector(`a[data-key="${CSS.escape(key)}"]`);
  if (link) {
    event.preventDefault();
    link.click();
  }
}

async function copy(button) {
  const source = document.getElementById(button.dataset.copy);
  try {
    await navigator.clipboard.writeText(source.textContent);
  } catch {
    // Browsers have no clipboard for pages that came over http from another machine.
    getSelection().selectAllChildren(source);
    if (!document.execCommand("copy")) return; // the text is selected: Ctrl+C copies it
  }
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy"), 2000);
}

showLocalTimes(document);
for (const button of document.querySelectorAll("button[data-copy]")) {
  button.hidden = false;
  button.addEventListener("click", () => copy(button));
}
if (status) watchEvents();
const keys = document.querySelector(".keys");
if (keys) {
  keys.hidden = false;
  document.addEventListener("keydown", onKey);
}
