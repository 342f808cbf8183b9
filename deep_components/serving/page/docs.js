"use strict";
// Shows openapi.json: paths, what they take and return. Text is always set as text, never as markup.
const make = (tag, text, name) => {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (name) element.className = name;
  return element;
};
const kind = (schema) => {
  if (schema.$ref) return schema.$ref.split("/").at(-1);
  if (schema.anyOf) return schema.anyOf.map(kind).join(" or ");
  if (schema.type === "array") return `list of ${kind(schema.items)}`;
  return schema.type ?? "anything";
};
const table = (rows, title) => {
  const [box, element, head, body] = [make("div", undefined, "scroll"), make("table"), make("thead"), make("tbody")];
  const top = make("tr");
  for (const name of [title, "type", "default", ""]) {
    const cell = make("th", name);
    cell.scope = "col";
    top.append(cell);
  }
  for (const [name, schema, required, words] of rows) {
    const row = make("tr");
    const cell = make("th", name);
    cell.scope = "row";
    row.append(cell, make("td", kind(schema)), make("td", required ? "required" : JSON.stringify(schema.default ?? null)),
      make("td", words ?? schema.description ?? ""));
    body.append(row);
  }
  head.append(top);
  element.append(head, body);
  box.append(element);
  box.tabIndex = 0;
  return box;
};
const fields = (schema, title) => table(Object.entries(schema.properties)
  .map(([name, field]) => [name, field, schema.required?.includes(name)]), title);
const operation = (path, verb, what, schemas) => {
  const section = make("section");
  const title = make("h2");
  title.append(make("span", verb.toUpperCase(), "verb"), make("code", path));
  section.append(title, make("p", what.summary));
  if (what.description) section.append(make("p", what.description, "note"));
  if (what.parameters) section.append(table(what.parameters.map((one) => [one.name, one.schema, one.required, one.description]), "parameter"));
  const body = what.requestBody?.content["application/json"];
  if (body) {
    const example = JSON.stringify(body.example);
    section.append(fields(body.schema, "field of the body"), make("p", "For example:"),
      make("pre", `curl -X POST ${location.origin}${path} -H 'Content-Type: application/json' \\\n  -d '${example}'`));
  }
  const answer = what.responses["200"]?.content?.["application/json"]?.schema;
  const name = answer?.$ref?.split("/").at(-1);
  if (name) section.append(make("p", `Answers with ${name}:`), fields(schemas[name], "field of the answer"));
  return section;
};
const start = async () => {
  const { paths, components: { schemas } } = await (await fetch("openapi.json")).json();
  const main = document.getElementById("main");
  for (const [path, verbs] of Object.entries(paths)) {
    for (const [verb, what] of Object.entries(verbs)) main.append(operation(path, verb, what, schemas));
  }
  for (const name of ["ListAnswer", "CandidateAnswer", "ErrorAnswer"]) {
    const section = make("section");
    section.append(make("h2", name), make("p", schemas[name].description), fields(schemas[name], "field"));
    main.append(section);
  }
};
start();
