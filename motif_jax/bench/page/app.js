// The page of a study. It works on a list of tasks, one after the other, and keeps every answer at once: in the browser when it was
// opened as a file, on the server otherwise. What is half done on the screen (`draft`) is in the browser in both cases.
"use strict";

const study = window.STUDY;
const $ = (id) => document.getElementById(id);
const videos = [$("left"), $("right")];
const KEYS = { 1: "left", 2: "right", 3: "tie", i: "image_alignment", t: "text_alignment", m: "object_motion", q: "overall_quality" };
const DESYNC = 0.15; // seconds between the videos that nobody sees

let session = null; // {who: {annotator, sheet}, tasks, done: Set of task ids}
let draft = null; // the answer being given: {task, choice, reasons, comment, plays, seconds}, and once it is fixed {record}
let phase = ""; // "answer", "lesson" (an example is being explained), "saving"

// ---- what the browser keeps -------------------------------------------------------------------------------------------------------

const slot = (...parts) => JSON.stringify([study.id, ...parts]);
const recall = (key) => JSON.parse(localStorage.getItem(key) || "null");
const keep = (key, value) => localStorage.setItem(key, JSON.stringify(value));
const draftSlot = () => slot("draft", session.who);
const keepDraft = () => {
  try {
    keep(draftSlot(), draft);
  } catch {} // storage is full: only a reload would miss the draft, and `send` says it for an answer
};
const answersOf = (annotator) => recall(slot("answers", annotator)) || [];

// ---- the two places where answers go ----------------------------------------------------------------------------------------------

async function post(path, data) {
  const response = await fetch(path, { method: "POST", body: JSON.stringify(data) });
  const found = await response.json().catch(() => ({}));
  if (!response.ok) throw Object.assign(new Error(found.error || response.statusText), { status: response.status });
  return found;
}

const browserStore = {
  open: async (annotator, sheet) => ({ sheet, tasks: study.sheets[sheet], done: answersOf(annotator).map((a) => a.task), trained: [] }),
  async save(record) {
    const answers = answersOf(record.annotator);
    if (!answers.some((a) => a.task === record.task)) keep(slot("answers", record.annotator), [...answers, record]);
  },
};

const serverStore = {
  open: (annotator) => post("claim", { annotator }),
  save: (record) => post("vote", record),
};

const store = study.server ? serverStore : browserStore;

// ---- screens ----------------------------------------------------------------------------------------------------------------------

function show(id) {
  for (const name of ["start", "work", "end"]) $(name).hidden = name !== id;
  $("place").hidden = id !== "work";
}

const notice = (text) => ($("notice").textContent = text);

async function open(annotator, sheet) {
  let found;
  try {
    found = await store.open(annotator, sheet);
  } catch (error) {
    show("start");
    notice(error.status ? `That did not work: ${error.message}` : "The server cannot be reached. Please try again.");
    return;
  }
  notice("");
  if (found.sheet === null) return finish(true, found.later);
  const tasks = [...study.training, ...found.tasks];
  session = { who: { annotator, sheet: found.sheet }, tasks, done: new Set([...found.done, ...found.trained]) };
  sessionStorage.setItem(slot("session"), JSON.stringify(session.who));
  keep(slot("name"), annotator);
  $("download").hidden = study.server;
  advance();
}

function advance() {
  const left = session.tasks.filter((t) => !session.done.has(t.task));
  if (!left.length) return finish(false);
  // Examples are counted for themselves: the second sheet has none.
  const [first, all] = left[0].better ? ["Example ", study.training] : ["", session.tasks.slice(study.training.length)];
  const done = all.filter((t) => session.done.has(t.task)).length;
  $("bar").max = all.length;
  $("bar").value = done;
  $("count").textContent = `${first}${done + 1} of ${all.length}`;
  const before = recall(draftSlot());
  draft = before && before.task === left[0].task ? before : { task: left[0].task, choice: "", reasons: [], comment: "", plays: 0, seconds: 0 };
  show("work");
  present(left[0], left[1]);
  if (draft.record) send(); // the page was closed before the server had answered
}

function present(task, following) {
  phase = "answer";
  held = over = false;
  $("prompt").textContent = task.prompt;
  $("example").hidden = !task.better;
  $("lesson").hidden = true;
  $("comment").value = draft.comment;
  $("next").textContent = "Next";
  for (const input of document.querySelectorAll("#judge .options input")) input.checked = draft.choice === input.value || draft.reasons.includes(input.value);
  $("image").src = source(task.image);
  videos[0].src = source(task.left);
  videos[1].src = source(task.right);
  update();
  $("prompt").focus();
  scrollTo(0, 0); // focus scrolls nothing where it was already
  if (following) preload(following);
}

const source = (name) => `media/${name}`;
const made = (element, fields) => Object.assign(document.createElement(element), fields);
let ahead = []; // elements that hold the next task's files, so that they are not thrown away

function preload(task) {
  const videos = [task.left, task.right].map((name) => made("video", { preload: "auto", muted: true, src: source(name) }));
  ahead = [made("img", { src: source(task.image) }), ...videos];
}

function update() {
  if (!draft) return; // a video may still report when everything is over
  const watched = draft.plays > 0;
  const answered = draft.choice === "tie" || (draft.choice && draft.reasons.length);
  const open = phase === "answer";
  $("watch").hidden = watched;
  $("choices").disabled = !watched || !open;
  $("reasons").disabled = !watched || !open || !draft.choice || draft.choice === "tie";
  $("comment").disabled = !open;
  $("next").disabled = phase === "saving" || !watched || !answered;
  $("pause").textContent = videos.some((v) => !v.paused) ? "Pause" : "Play";
}

// nothing: there was no sheet; later: others have not finished theirs, which may come free.
function finish(nothing, later) {
  show("end");
  draft = null;
  for (const video of videos) video.pause();
  sessionStorage.removeItem(slot("session"));
  $("thanks").textContent = nothing ? "There is nothing left to judge for you now. Thank you!" : "This sheet is complete. Thank you!";
  $("after").textContent = study.server ? "All your answers are saved." : "Please download your answers and send the file to whoever asked you.";
  if (later) {
    $("thanks").textContent = "Other people are judging what is left.";
    $("after").textContent = "Not all of them may finish. Please come back in an hour, under the same name. Whatever you have answered is saved.";
  }
  $("more").hidden = nothing || !study.server;
  $("thanks").focus();
}

// ---- videos: both from the start, both to the end, again --------------------------------------------------------------------------

let held = false; // the person pressed Pause
let over = false; // this round has been counted

function replay(asked) {
  if (!draft) return;
  over = false;
  for (const video of videos) video.currentTime = 0;
  play(asked);
}

// A browser that refuses to start or even to load videos by itself leaves the button "Play": `asked` is its click.
function play(asked) {
  if (asked) held = false;
  if (held || document.hidden || (!asked && videos.some((v) => v.readyState < 3))) return;
  Promise.all(videos.filter((v) => v.paused && !v.ended).map((v) => v.play())).catch(() => {}).finally(update);
}

function seen(video) {
  let seconds = 0;
  for (let i = 0; i < video.played.length; i++) seconds += video.played.end(i) - video.played.start(i);
  return seconds >= 0.9 * video.duration; // skipping to the end is not watching
}

// After every event of either video. A browser may stop one by itself, for one when it is sent back just as it ends: it is started again.
function together() {
  if (!draft) return;
  const [a, b] = videos;
  if (a.ended && b.ended) {
    if (over) return;
    over = true;
    if (videos.every(seen)) {
      draft.plays += 1;
      keepDraft();
    }
    setTimeout(replay, 400);
    update();
  } else {
    if (!a.ended && !b.ended && !a.seeking && !b.seeking && Math.abs(a.currentTime - b.currentTime) > DESYNC) b.currentTime = a.currentTime;
    if (a.paused || b.paused) play();
  }
}

function setUpVideos() {
  for (const video of videos) {
    video.muted = true; // the attribute alone does not count in every browser
    for (const event of ["canplay", "timeupdate", "seeked", "pause", "ended"]) video.addEventListener(event, together);
    video.addEventListener("error", () => notice("A video could not be loaded. Please reload the page."));
    video.addEventListener("contextmenu", (event) => event.preventDefault());
  }
  document.addEventListener("visibilitychange", () => (document.hidden ? videos.forEach((v) => v.pause()) : draft && play()));
}

function toggle() {
  held = videos.some((v) => !v.paused);
  if (held) for (const video of videos) video.pause();
  else if (videos.every((v) => v.ended)) replay(true);
  else play(true);
  setTimeout(update, 50);
}

// ---- answers ----------------------------------------------------------------------------------------------------------------------

function choose(value) {
  const input = document.querySelector(`#judge .options input[value=${value}]`);
  if (!input || input.closest("fieldset").disabled) return;
  input.checked = input.type === "radio" || !input.checked;
  read();
}

function read() {
  draft.choice = document.querySelector("#choice-options input:checked")?.value || "";
  if (draft.choice === "tie") for (const input of document.querySelectorAll("#reason-options input")) input.checked = false;
  draft.reasons = [...document.querySelectorAll("#reason-options input:checked")].map((input) => input.value);
  draft.comment = $("comment").value;
  keepDraft();
  update();
}

async function submit() {
  if ($("next").disabled) return;
  const task = session.tasks.find((t) => t.task === draft.task);
  if (task.better && phase === "answer") {
    phase = "lesson";
    explain(task);
    return update();
  }
  const { choice, reasons, comment, plays } = draft;
  const seconds = Math.round(100 * draft.seconds) / 100;
  // Fixed before it is first sent: if the server's answer gets lost, sending the same again is no second vote.
  draft.record = { ...session.who, task: task.task, choice, reasons, comment, plays, seconds, time: new Date().toISOString() };
  keepDraft();
  send();
}

async function send() {
  phase = "saving";
  update();
  for (;;) {
    try {
      await store.save(draft.record);
      notice("");
      session.done.add(draft.task);
      localStorage.removeItem(draftSlot());
      return advance();
    } catch (error) {
      if (error.status === 409) {
        // Answered in another window, or the sheet is somebody else's now.
        localStorage.removeItem(draftSlot());
        return open(session.who.annotator, session.who.sheet);
      }
      if (error.status && error.status < 500) {
        draft.record = null;
        phase = "answer";
        update();
        return notice(`This answer was not accepted: ${error.message}`);
      }
      notice(error instanceof DOMException // of localStorage; fetch throws TypeError
        ? "This browser's storage is full, so your answer is not saved yet. Please free some (site data); it is tried again."
        : "The server does not answer. Your answer is kept here and sent again.");
      await new Promise((resolve) => setTimeout(resolve, 2000));
    }
  }
}

function explain(task) {
  const reason = study.reasons.find((r) => r.id === task.reason);
  const better = task.better === "left" ? "Video 1" : "Video 2";
  const right = draft.choice === task.better ? "Yes" : "Look again";
  $("lesson").textContent = `${right}: ${better} is better. The reason to tick here is "${reason.label}": ${reason.lesson}`;
  $("lesson").hidden = false;
  $("next").textContent = "Continue";
  // On a laptop both are below the screen, and whoever uses the keyboard would go on without having seen them.
  for (const id of ["next", "lesson"]) $(id).scrollIntoView({ block: "nearest" });
}

function download() {
  const annotator = session.who.annotator;
  const data = { study: study.id, annotator, votes: answersOf(annotator) };
  const name = [...annotator.replace(/[^\p{L}\p{M}\p{N}_-]+/gu, "_")].slice(0, 40).join("");
  const href = URL.createObjectURL(new Blob([JSON.stringify(data, null, 1)], { type: "application/json" }));
  made("a", { href, download: `votes-${name}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(href), 1000);
}

// ---- set-up -----------------------------------------------------------------------------------------------------------------------

function option(parent, type, name, value, label, help, key) {
  const input = made("input", { type, name, value });
  const box = made("label");
  const text = made("span", { textContent: label });
  if (help) text.append(made("small", { textContent: help }));
  box.append(input, text, made("kbd", { textContent: key.toUpperCase(), ariaHidden: "true" }));
  input.setAttribute("aria-keyshortcuts", key);
  parent.append(box);
}

function setUpForm() {
  const keyOf = (value) => Object.keys(KEYS).find((key) => KEYS[key] === value);
  document.title = study.title;
  $("title").textContent = study.title;
  $("question").textContent = study.question;
  document.documentElement.style.setProperty("--aspect", study.aspect);
  document.documentElement.style.setProperty("--width", study.width);
  const choices = [["left", "Video 1"], ["right", "Video 2"], ...(study.ties ? [["tie", "About the same"]] : [])];
  for (const [value, label] of choices) option($("choice-options"), "radio", "choice", value, label, "", keyOf(value));
  for (const reason of study.reasons) option($("reason-options"), "checkbox", "reason", reason.id, reason.label, reason.help, keyOf(reason.id));
  $("keys").textContent = `1 and 2 choose a video${study.ties ? ", 3 says about the same" : ""}; I, T, M, Q tick image alignment, text alignment, object motion, overall quality; Enter goes on; P pauses; R plays from the start.`;
  if (!study.server) {
    for (const name of Object.keys(study.sheets)) $("sheet").append(new Option(name, name));
    $("choose-sheet").hidden = false;
    $("sheet").required = true; // here: a hidden field that is required would hold up the form
    const asked = new URLSearchParams(location.search).get("sheet");
    if (Object.hasOwn(study.sheets, asked)) $("sheet").value = asked;
    else if (asked !== null) notice(`There is no sheet ${asked} in this study. Please choose the one that you were told, or ask.`);
  }
  $("annotator").value = recall(slot("name")) || "";
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || event.isComposing || $("work").hidden) return;
  const typing = event.target.id === "comment";
  // Caps Lock may be on; and a key that writes no such letter or digit here (Cyrillic, a French 1) goes by its place.
  const key = /^[a-z\d]$/i.test(event.key) ? event.key.toLowerCase() : event.code.match(/^(?:Key|Digit)(.)$/)?.[1].toLowerCase();
  if (event.key === "Enter" && !["BUTTON", "SUMMARY"].includes(event.target.tagName)) {
    event.preventDefault();
    submit();
  } else if (typing) return;
  else if (key === "p") toggle();
  else if (key === "r") replay(true);
  else if (KEYS[key]) choose(KEYS[key]);
}

function start() {
  try {
    keep(slot("works"), true);
  } catch {
    return notice("Your browser lets this page store nothing, so your answers would be lost. Please allow it to (site data, cookies), and reload.");
  }
  setUpForm();
  setUpVideos();
  $("enter").addEventListener("submit", (event) => {
    event.preventDefault();
    const annotator = $("annotator").value.normalize("NFC").trim();
    if (annotator) open(annotator, $("sheet").value);
  });
  $("judge").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  $("judge").addEventListener("input", read);
  $("pause").addEventListener("click", toggle);
  $("replay").addEventListener("click", () => replay(true));
  $("more").addEventListener("click", () => open(session.who.annotator, ""));
  $("download").addEventListener("click", download);
  document.addEventListener("keydown", onKey);
  setInterval(() => {
    if (draft && phase === "answer" && !document.hidden) {
      draft.seconds += 0.25;
      keepDraft();
    }
  }, 250);
  const before = JSON.parse(sessionStorage.getItem(slot("session")) || "null");
  if (before) open(before.annotator, before.sheet);
  else show("start");
}

start();
