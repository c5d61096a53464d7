//! Whether what a new schema allows is what readers of an older one expect. It knows the keywords our contracts use;
//! a change to any other is told rather than judged.

use std::{collections::BTreeSet, fmt::Display};

use serde_json::{Map, Value};

/// Who is hurt: consumers that are not changed and read what is emitted from now on.
const READERS_OF_RELEASED: &str = "consumers that know the released schema";

/// Who is hurt: consumers that are written to the new schema and read the topic from its beginning.
const READERS_FROM_THE_BEGINNING: &str = "consumers of the new schema that read events from before it";

/// What says nothing about which documents are valid.
const ANNOTATIONS: [&str; 6] = ["title", "description", "$comment", "examples", "default", "deprecated"];

const LOWER_BOUNDS: [&str; 5] = ["minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"];
const UPPER_BOUNDS: [&str; 5] = ["maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"];

/// What may be added, but not changed: whether one value implies another is not decided here.
const FIXED: [&str; 4] = ["pattern", "format", "multipleOf", "uniqueItems"];

/// Everything in `new` that breaks a reader of `released`: the place in the document (`*` is any element), what
/// changed, for whom.
pub(crate) fn breaks(new: &Value, released: &Value) -> Vec<String> {
    let mut comparison = Comparison { found: Vec::new() };
    let new = comparison.inline(new, new, &mut Vec::new());
    let released = comparison.inline(released, released, &mut Vec::new());
    comparison.compare("", &new, &released);
    comparison.found
}

struct Comparison {
    found: Vec<String>,
}

impl Comparison {
    fn add(&mut self, at: &str, what: impl Display) {
        self.add_for(at, what, READERS_OF_RELEASED);
    }

    fn add_for(&mut self, at: &str, what: impl Display, whom: &str) {
        let at = if at.is_empty() { "/" } else { at };
        self.found.push(format!("{at}: {what}; breaks {whom}"));
    }

    /// The schema with what it refers to in place of each `$ref`, so that a changed definition shows wherever it is
    /// used. `open` are the references that are being followed.
    fn inline<'a>(&mut self, schema: &'a Value, root: &'a Value, open: &mut Vec<&'a str>) -> Value {
        let members = match schema {
            Value::Array(elements) => return elements.iter().map(|e| self.inline(e, root, open)).collect(),
            Value::Object(members) => members,
            other => return other.clone(),
        };
        let mut inlined = Map::new();
        if let Some(reference) = members.get("$ref").and_then(Value::as_str) {
            let target = reference.strip_prefix('#').and_then(|pointer| root.pointer(pointer));
            match target {
                None => self.add("", format!("$ref {reference} leads nowhere")),
                Some(_) if open.contains(&reference) => {
                    self.add("", format!("$ref {reference} contains itself, which is not compared"));
                }
                Some(target) => {
                    open.push(reference);
                    if let Value::Object(target) = self.inline(target, root, open) {
                        inlined = target;
                    }
                    open.pop();
                }
            }
        }
        for (name, value) in members {
            if name == "$defs" || (name == "$ref" && value.is_string()) {
                continue;
            }
            let value = self.inline(value, root, open);
            let other = inlined.insert(name.clone(), value);
            if other.is_some() && !ANNOTATIONS.contains(&name.as_str()) {
                self.add(
                    "",
                    format!("{name} is given beside a $ref that gives it too, which is not compared"),
                );
            }
        }
        inlined.into()
    }

    fn compare(&mut self, at: &str, new: &Value, released: &Value) {
        let everything = Map::new();
        let (new, released) = match (new, released) {
            (Value::Bool(false), _) => return,
            (_, Value::Bool(false)) => return self.add(at, "is now allowed"),
            (new, released) => {
                (new.as_object().unwrap_or(&everything), released.as_object().unwrap_or(&everything))
            }
        };
        self.values(at, new, released);
        self.required(at, new, released);
        self.properties(at, new, released);
        self.below(&format!("{at}/*"), "additionalProperties", new, released);
        self.below(&format!("{at}/*"), "items", new, released);
        let keywords: BTreeSet<&str> = new.keys().chain(released.keys()).map(String::as_str).collect();
        for keyword in keywords {
            self.keyword(at, keyword, new.get(keyword), released.get(keyword));
        }
    }

    fn keyword(&mut self, at: &str, keyword: &str, new: Option<&Value>, released: Option<&Value>) {
        let elsewhere = ["enum", "const", "required", "properties", "additionalProperties", "items"];
        if new == released || ANNOTATIONS.contains(&keyword) || elsewhere.contains(&keyword) {
            return;
        }
        let ordered = LOWER_BOUNDS.contains(&keyword) || UPPER_BOUNDS.contains(&keyword);
        let known = ordered || FIXED.contains(&keyword) || keyword == "type";
        match (new, released) {
            (Some(new), Some(released)) => {
                let bounds = new.as_f64().zip(released.as_f64());
                let narrower = match keyword {
                    "type" => types(new).is_subset(&types(released)),
                    _ if LOWER_BOUNDS.contains(&keyword) => bounds.is_some_and(|(new, old)| new >= old),
                    _ if UPPER_BOUNDS.contains(&keyword) => bounds.is_some_and(|(new, old)| new <= old),
                    _ => false,
                };
                if !narrower {
                    self.add(at, format!("{keyword} went from {released} to {new}"));
                }
            }
            (None, _) => self.add(at, format!("{keyword} is no longer given")),
            (Some(new), None) if !known => {
                self.add(at, format!("{keyword} is given now ({new}), and is not known to this comparison"));
            }
            (Some(_), None) => (),
        }
    }

    /// The values that are listed, by `enum` or `const`.
    fn values(&mut self, at: &str, new: &Map<String, Value>, released: &Map<String, Value>) {
        let Some(expected) = listed(released) else { return };
        match listed(new) {
            None => self.add(at, "may now be any value"),
            Some(values) => {
                for value in values.iter().filter(|value| !expected.contains(value)) {
                    self.add(at, format!("may now be {value}"));
                }
            }
        }
    }

    fn required(&mut self, at: &str, new: &Map<String, Value>, released: &Map<String, Value>) {
        let names = |schema: &Map<String, Value>| -> BTreeSet<String> {
            let names = schema.get("required").and_then(Value::as_array);
            names.into_iter().flatten().filter_map(|n| Some(n.as_str()?.to_owned())).collect()
        };
        let (new, released) = (names(new), names(released));
        for name in released.difference(&new) {
            self.add(&format!("{at}/{name}"), "is no longer required");
        }
        for name in new.difference(&released) {
            self.add_for(&format!("{at}/{name}"), "is required now", READERS_FROM_THE_BEGINNING);
        }
    }

    fn properties(&mut self, at: &str, new: &Map<String, Value>, released: &Map<String, Value>) {
        let none = Map::new();
        let of = |schema: &'_ Map<String, Value>| {
            schema.get("properties").and_then(Value::as_object).unwrap_or(&none).clone()
        };
        let (now, before) = (of(new), of(released));
        for (name, property) in &before {
            let at = format!("{at}/{name}");
            match now.get(name) {
                None => self.add(&at, "was removed"),
                Some(new) => self.compare(&at, new, property),
            }
        }
        let others = released.get("additionalProperties").unwrap_or(&Value::Bool(true));
        for (name, property) in now.iter().filter(|(name, _)| !before.contains_key(*name)) {
            // To a reader that knows no such field it is one of any.
            if *others != Value::Bool(true) {
                self.compare(&format!("{at}/{name}"), property, others);
            }
        }
    }

    /// A schema below this one, which allows everything if it is absent.
    fn below(&mut self, at: &str, keyword: &str, new: &Map<String, Value>, released: &Map<String, Value>) {
        if let Some(released) = released.get(keyword) {
            self.compare(at, new.get(keyword).unwrap_or(&Value::Bool(true)), released);
        }
    }
}

/// The type names; an integer is a number.
fn types(value: &Value) -> BTreeSet<&str> {
    let names = value.as_array().map_or_else(|| vec![value], |names| names.iter().collect());
    let mut names: BTreeSet<&str> = names.into_iter().filter_map(Value::as_str).collect();
    if names.contains("number") {
        names.insert("integer");
    }
    names
}

fn listed(schema: &Map<String, Value>) -> Option<Vec<&Value>> {
    match (schema.get("const"), schema.get("enum")) {
        (Some(only), _) => Some(vec![only]),
        (None, Some(Value::Array(values))) => Some(values.iter().collect()),
        (None, _) => None,
    }
}
