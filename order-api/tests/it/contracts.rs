//! The events' schemas against the ones that were released: whoever reads the topic goes on reading it. These tests
//! need no server.

use std::{collections::BTreeSet, fs, path::PathBuf};

use serde_json::{Value, json};

use crate::compatibility::breaks;

fn contracts() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../contracts")
}

fn read(path: &str) -> Value {
    let text = fs::read_to_string(contracts().join(path))
        .unwrap_or_else(|e| panic!("contracts/{path}: {e}; contracts/README.md says how a release is made"));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("contracts/{path}: {e}"))
}

/// The events a folder has schemas of.
fn events(folder: &str) -> BTreeSet<String> {
    let files = fs::read_dir(contracts().join(folder)).unwrap();
    files
        .filter_map(|file| {
            let name = file.unwrap().file_name().into_string().unwrap();
            name.strip_suffix(".schema.json").map(ToOwned::to_owned)
        })
        .collect()
}

/// The layout of the body: 1 unless the schema asks for another `schemaVersion`.
fn layout(schema: &Value) -> u64 {
    let Some(version) = schema["properties"].get("schemaVersion") else { return 1 };
    let required = schema["required"].as_array().unwrap().contains(&json!("schemaVersion"));
    assert!(required, "{}: schemaVersion must be required", schema["$id"]);
    version["const"].as_u64().expect("schemaVersion is the const that tells the layout")
}

#[test]
fn no_schema_breaks_whoever_reads_by_the_released_one() {
    let mut found = Vec::new();
    for event in events("events") {
        let schema = read(&format!("events/{event}.schema.json"));
        let released = read(&format!("released/{}/{event}.schema.json", layout(&schema)));
        found.extend(breaks(&schema, &released).into_iter().map(|what| format!("{event}{what}")));
    }
    assert!(
        found.is_empty(),
        "{}\n\ncontracts/README.md says which changes there may be, and how another layout is made",
        found.join("\n")
    );
}

#[test]
fn every_released_event_still_exists_and_every_event_is_released() {
    let mut released = BTreeSet::new();
    for folder in fs::read_dir(contracts().join("released")).unwrap() {
        let folder = folder.unwrap().file_name().into_string().unwrap();
        released.extend(events(&format!("released/{folder}")));
    }
    assert_eq!(events("events"), released, "left: contracts/events, right: contracts/released");
}

#[test]
fn the_examples_are_read_by_the_released_schema_too() {
    for event in events("events") {
        let example = read(&format!("events/{event}.example.json"));
        let layout = example.get("schemaVersion").map_or(1, |v| v.as_u64().unwrap());
        let released = read(&format!("released/{layout}/{event}.schema.json"));
        let validator = jsonschema::options().should_validate_formats(true).build(&released).unwrap();
        let problems: Vec<_> =
            validator.iter_errors(&example).map(|e| format!("{}: {e}", e.instance_path())).collect();
        assert_eq!(problems, Vec::<String>::new(), "{event}");
    }
}

/// A schema that uses every keyword which is understood.
fn schema() -> Value {
    json!({
        "$id": "Thing", "title": "Thing", "type": "object", "required": ["id", "lines"],
        "properties": {
            "id": {"description": "Its id.", "$ref": "#/$defs/id"},
            "status": {"enum": ["new", "old"]},
            "kind": {"const": "Thing"},
            "when": {"type": "string", "format": "date-time"},
            "amount": {"type": "number", "minimum": 0, "exclusiveMaximum": 100, "multipleOf": 0.5},
            "note": {"type": ["string", "null"], "minLength": 1, "maxLength": 10},
            "lines": {
                "type": "array", "minItems": 1, "maxItems": 9, "uniqueItems": true,
                "items": {
                    "type": "object", "required": ["of"], "additionalProperties": false,
                    "properties": {"of": {"$ref": "#/$defs/id"}, "count": {"type": "integer"}},
                },
            },
            "labels": {"type": "object", "maxProperties": 3, "additionalProperties": {"type": "string"}},
            "choice": {"anyOf": [{"$ref": "#/$defs/id"}, {"type": "boolean"}]},
        },
        "$defs": {"id": {"type": "string", "pattern": "^[a-z]{1,8}$"}},
    })
}

/// The findings about the schema after a value of it is set, or removed with `None`.
fn changed(pointer: &str, value: Option<Value>) -> Vec<String> {
    let mut new = schema();
    let (parent, last) = pointer.rsplit_once('/').unwrap();
    let parent = new.pointer_mut(parent).unwrap().as_object_mut().unwrap();
    match value {
        Some(value) => parent.insert(last.into(), value),
        None => Some(parent.remove(last).unwrap()),
    };
    breaks(&new, &schema())
}

#[test]
fn each_break_is_named() {
    let line = "/properties/lines/items";
    let at = |path: &str| format!("{line}{path}");
    let cases = [
        // What is there no longer.
        ("/required".into(), Some(json!(["lines"])), "/id: is no longer required"),
        ("/required".into(), None, "/id: is no longer required"),
        ("/properties/status".into(), None, "/status: was removed"),
        (at("/properties/count"), None, "/lines/*/count: was removed"),
        ("/properties".into(), None, "/note: was removed"),
        // What is another type.
        (
            "/properties/when/type".into(),
            Some(json!("integer")),
            "/when: type went from \"string\" to \"integer\"",
        ),
        ("/properties/when/type".into(), Some(json!(["string", "null"])), "/when: type went from"),
        ("/properties/when/type".into(), None, "/when: type is no longer given"),
        (at("/properties/count/type"), Some(json!("number")), "/lines/*/count: type went from"),
        ("/type".into(), None, "/: type is no longer given"),
        // What may have other values.
        (
            "/properties/status/enum".into(),
            Some(json!(["new", "old", "lost"])),
            "/status: may now be \"lost\"",
        ),
        ("/properties/status/enum".into(), None, "/status: may now be any value"),
        ("/properties/kind/const".into(), Some(json!("Other")), "/kind: may now be \"Other\""),
        ("/properties/kind".into(), Some(json!({"enum": ["Thing", "Other"]})), "/kind: may now be \"Other\""),
        ("/properties/kind".into(), Some(json!(true)), "/kind: may now be any value"),
        // Bounds, each of them loosened or gone.
        ("/properties/note/minLength".into(), Some(json!(0)), "/note: minLength went from 1 to 0"),
        ("/properties/note/minLength".into(), None, "/note: minLength is no longer given"),
        ("/properties/note/maxLength".into(), Some(json!(11)), "/note: maxLength went from 10 to 11"),
        ("/properties/amount/minimum".into(), Some(json!(-0.5)), "/amount: minimum went from 0 to -0.5"),
        ("/properties/amount/exclusiveMaximum".into(), Some(json!(101)), "/amount: exclusiveMaximum went"),
        ("/properties/lines/minItems".into(), None, "/lines: minItems is no longer given"),
        ("/properties/lines/maxItems".into(), Some(json!(10)), "/lines: maxItems went from 9 to 10"),
        (
            "/properties/labels/maxProperties".into(),
            Some(json!(4)),
            "/labels: maxProperties went from 3 to 4",
        ),
        // What cannot be compared must stay.
        ("/properties/when/format".into(), None, "/when: format is no longer given"),
        ("/properties/when/format".into(), Some(json!("date")), "/when: format went from"),
        ("/properties/amount/multipleOf".into(), Some(json!(0.25)), "/amount: multipleOf went from"),
        ("/properties/lines/uniqueItems".into(), Some(json!(false)), "/lines: uniqueItems went from"),
        // A definition is looked at wherever it is used, also where nothing else is understood.
        ("/$defs/id/pattern".into(), Some(json!("^[a-z]+$")), "/id: pattern went from"),
        ("/$defs/id/pattern".into(), None, "/lines/*/of: pattern is no longer given"),
        ("/$defs/id/pattern".into(), Some(json!("^[a-z]+$")), "/choice: anyOf went from"),
        ("/$defs/id".into(), None, "/: $ref #/$defs/id leads nowhere"),
        // Fields that the reader does not know.
        (at("/additionalProperties"), None, "/lines/*/*: is now allowed"),
        (at("/properties/more"), Some(json!({"type": "string"})), "/lines/*/more: is now allowed"),
        (
            "/properties/labels/additionalProperties".into(),
            Some(json!(true)),
            "/labels/*: type is no longer given",
        ),
        (
            "/properties/labels/properties".into(),
            Some(json!({"x": {"type": "null"}})),
            "/labels/x: type went from",
        ),
        (at(""), None, "/lines/*: type is no longer given"),
        (at(""), Some(json!(true)), "/lines/*: type is no longer given"),
        // What this comparison knows nothing of.
        ("/properties/choice/anyOf".into(), None, "/choice: anyOf is no longer given"),
        ("/properties/note/not".into(), Some(json!({"const": "x"})), "/note: not is given now"),
        ("/patternProperties".into(), Some(json!({"^x": true})), "/: patternProperties is given now"),
        ("/$id".into(), Some(json!("Other")), "/: $id went from"),
        // Who reads the topic from its beginning.
        ("/required".into(), Some(json!(["id", "lines", "note"])), "/note: is required now"),
    ];
    for (pointer, value, expected) in cases {
        let told = format!("{pointer} = {value:?}");
        let found = changed(&pointer, value);
        assert!(found.iter().any(|what| what.starts_with(expected)), "{told}: {found:#?}");
    }
}

#[test]
fn a_break_says_for_whom() {
    let released = changed("/properties/status", None);
    assert_eq!(released, ["/status: was removed; breaks consumers that know the released schema"]);
    let beginning = changed("/required", Some(json!(["id", "lines", "note"])));
    assert_eq!(
        beginning,
        ["/note: is required now; breaks consumers of the new schema that read events from before it"]
    );
}

#[test]
fn a_schema_that_contains_itself_is_an_error_and_not_a_loop() {
    let found = changed("/$defs/id", Some(json!({"type": "array", "items": {"$ref": "#/$defs/id"}})));
    assert!(found.iter().any(|what| what.contains("contains itself")), "{found:#?}");
}

#[test]
fn what_breaks_nobody_passes() {
    assert_eq!(breaks(&schema(), &schema()), Vec::<String>::new());
    for (pointer, value) in [
        // Fields that may be ignored.
        ("/properties/more", Some(json!({"type": "string", "description": "New."}))),
        ("/properties/more", Some(json!(true))),
        ("/$defs/amount", Some(json!({"type": "string"}))),
        // Words.
        ("/title", Some(json!("Another"))),
        ("/description", Some(json!("A thing."))),
        ("/properties/id/description", None),
        ("/properties/note/examples", Some(json!(["x"]))),
        ("/properties/note/$comment", Some(json!("x"))),
        // Less than was promised to be possible.
        ("/properties/note/type", Some(json!("string"))),
        ("/properties/amount/type", Some(json!("integer"))),
        ("/properties/status/enum", Some(json!(["new"]))),
        ("/properties/status", Some(json!({"const": "old"}))),
        ("/properties/note/minLength", Some(json!(2))),
        ("/properties/note/maxLength", Some(json!(9))),
        ("/properties/amount/maximum", Some(json!(9))),
        ("/properties/note/pattern", Some(json!("^x"))),
        ("/additionalProperties", Some(json!(false))),
        ("/properties/labels/additionalProperties", Some(json!(false))),
        // The same, said in another place.
        ("/properties/id", Some(json!({"type": "string", "pattern": "^[a-z]{1,8}$"}))),
    ] {
        let told = format!("{pointer} = {value:?}");
        assert_eq!(changed(pointer, value), Vec::<String>::new(), "{told}");
    }
}
