// The rating page. What is shown follows from two things only: `state`, what the server said last, and `outbox`, the answers
// that it has not acknowledged. So the page is never ahead of what can be kept: an answer leaves the outbox when the server
// says that it is on the disk. Answers go out one after the other, again and again until they arrive; a second arrival of the
// same answer is acknowledged and changes nothing.

const STORE = "outbox " + location.pathname;   // of this tab; it outlives a reload
const RETRY = 1000, LOOK = 2000, REST = 10000; // ms: server gone; nothing to rate now; pictures are there
const NEAR = 4;                                // questions whose pictures are held: this one, and the next
const SMALL = 256;                             // px: pictures up to this side are shown by their pixels

const $ = (id) => document.getElementById(id);
const outbox = JSON.parse(sessionStorage.getItem(STORE) || "[]"); // {key, answer}, oldest first
const images = new Map();                      // sha256 -> <img>, of what is shown and what comes next
let state = null;                              // {run, asked, rated, next, recent}; see rate.py
let shown = "";                                // key of the question on the page
let refused = "";                              // why an answer cannot be kept; said until the next one is given
let wake = null, timer = 0;                    // ends the pause of `talk`

// ------------------------------------------------------------------------------------------------- what is, and what is next

// The state as it will be when the outbox has arrived.
function ahead() {
  const given = state.recent.map((question) => question.key);
  let rated = state.rated;
  for (const { key, answer } of outbox) {
    const at = given.indexOf(key);
    if (answer === "undo" && at >= 0) { given.splice(at, 1); rated -= 1; }
    if (answer !== "undo" && at < 0) { given.push(key); rated += 1; }
  }
  const open = [...state.recent, ...state.next].filter((question) => !given.includes(question.key));
  open.sort((one, other) => one.place - other.place);
  return { open, rated, last: given.at(-1) };
}

// ------------------------------------------------------------------------------------------------------------ the person acts

function answer(what) {
  if (!state) return;
  const { open, last } = ahead();
  if (what === "undo") {
    if (last) send({ key: last, answer: "undo" });
  } else if (open.length && open[0].key === shown && (what === "skip" || ready(open[0]))) { // nobody judges what is not to be seen
    send({ key: shown, answer: what });
  }
}

function send(entry) {
  refused = "";
  outbox.push(entry);
  sessionStorage.setItem(STORE, JSON.stringify(outbox));
  render();
  if (wake) wake();
}

addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey || !state) return;
  const question = ahead().open[0];
  const answers = question ? question.answers : [];
  const keys = { ArrowDown: "skip", s: "skip", ArrowUp: "undo", u: "undo", Backspace: "undo" };
  answers.forEach((one, i) => { keys[i + 1] = one; });
  if (answers.length === 2) [keys.ArrowLeft, keys.ArrowRight] = answers;
  const what = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (what === undefined) return;
  event.preventDefault();
  answer(what);
});

// The second click of a double click is not meant for the next pictures.
const onClick = (button, what) => button.addEventListener("click", (event) => { if (event.detail < 2) answer(what); });
onClick($("undo"), "undo");
onClick($("skip"), "skip");

addEventListener("beforeunload", (event) => { if (outbox.length) event.preventDefault(); });

// ------------------------------------------------------------------------------------------------------- talking to the server

async function talk() {
  for (;;) {
    const entry = outbox[0];
    let pause;
    try {
      const reply = await (entry
        ? fetch("answer", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(entry) })
        : fetch("state"));
      if (reply.status === 409) { // it can never be kept: say so, and go on from what stands
        refused = await reply.text();
        settle();
        continue;
      }
      if (!reply.ok) throw new Error(await reply.text());
      state = await reply.json();
      if (entry) settle();
      trouble(refused);
      pause = outbox.length ? 0 : ahead().open.length ? REST : LOOK;
    } catch (error) {
      const kept = outbox.length ? ` ${outbox.length} answer${outbox.length > 1 ? "s are" : " is"} kept here and sent when it is back.` : "";
      const why = error instanceof TypeError ? `The server does not answer. Start it again: sdcore rate ${state ? state.run : "RUN"}.` : `The server says: ${error.message}.`;
      trouble(why + kept);
      pause = RETRY;
    }
    render();
    if (pause) await new Promise((resolve) => { wake = resolve; timer = setTimeout(resolve, pause); });
    clearTimeout(timer);
    wake = null;
  }
}

function settle() {
  outbox.shift();
  sessionStorage.setItem(STORE, JSON.stringify(outbox));
}

// ------------------------------------------------------------------------------------------------------------------ what is seen

function trouble(text) {
  if ($("trouble").textContent !== text) $("trouble").textContent = text;
}

function image(hash) {
  if (!images.has(hash)) {
    const made = new Image();
    made.addEventListener("load", () => { made.classList.toggle("small", Math.max(made.naturalWidth, made.naturalHeight) <= SMALL); render(); });
    made.addEventListener("error", () => { images.delete(hash); setTimeout(render, RETRY); }); // asks for it again
    made.src = "pictures/" + hash;
    images.set(hash, made);
  }
  return images.get(hash);
}

const ready = (question) => question.pictures.every((hash) => images.get(hash)?.naturalWidth > 0);

function render() {
  if (!state) return;
  const { open, rated, last } = ahead();
  const question = open[0];
  const near = new Set(open.slice(0, NEAR).flatMap((one) => one.pictures));
  near.forEach(image); // the next ones are loaded while this one is looked at
  for (const hash of images.keys()) if (!near.has(hash)) images.delete(hash);
  $("progress").value = rated;
  $("progress").max = Math.max(state.asked, 1);
  $("count").textContent = `${rated} of ${state.asked}`;
  $("undo").disabled = !last;
  $("skip").disabled = !question;
  const pair = question && question.pictures.length === 2;
  $("question").textContent = !question ? "Rate pictures" : pair ? "Which one is better?" : "How good is it?";
  $("prompt").textContent = question ? question.prompt : "";
  $("scores").hidden = !question || pair;

  const whole = question && ready(question);
  const now = question ? question.key + (whole ? "" : " …") : `none ${outbox.length} ${state.asked}`;
  if (now === $("pictures").dataset.now) return;
  $("pictures").dataset.now = now;
  shown = question ? question.key : "";
  const focused = [...document.querySelectorAll("#pictures > *")].indexOf(document.activeElement);
  if (!whole) {
    $("pictures").replaceChildren(message(question));
  } else {
    $("pictures").replaceChildren(...question.pictures.map((hash, i) => card(question, hash, i)));
    if (focused >= 0) $("pictures").children[focused]?.focus(); // who walks with Tab stays where they were
    $("said").textContent = `${pair ? "Pair" : "Picture"} ${rated + 1} of ${state.asked}: ${question.prompt}`;
  }
}

function card(question, hash, i) {
  const pair = question.pictures.length === 2;
  const made = document.createElement(pair ? "button" : "div");
  const which = ["first", "second"][i];
  const picture = image(hash);
  picture.alt = pair ? `${which} picture` : "the picture";
  made.className = "picture";
  made.append(picture);
  if (pair) {
    const key = document.createElement("kbd");
    key.textContent = ["←", "→"][i];
    made.append(key);
    made.type = "button";
    made.setAttribute("aria-label", `${which} picture is better`);
    made.setAttribute("aria-keyshortcuts", ["ArrowLeft 1", "ArrowRight 2"][i]);
    onClick(made, question.answers[i]);
  }
  return made;
}

function message(question) {
  const made = document.createElement("p");
  made.textContent = question ? "Loading …"
    : outbox.length ? "Sending the last answers …"
    : !state.asked ? "Nothing to rate yet. Pictures appear here as soon as a run asks about them."
    : `All ${state.asked} are rated, and kept. Thank you! You can close this page; if the run asks for more, they appear here.`;
  if (!question) $("said").textContent = made.textContent;
  return made;
}

for (let score = 1; score <= 5; score += 1) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = score;
  made.setAttribute("aria-label", `score ${score} of 5`);
  made.setAttribute("aria-keyshortcuts", score);
  onClick(made, score);
  $("scores").append(made);
}
talk();
