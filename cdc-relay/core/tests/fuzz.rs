//! The fuzz targets' functions over their corpus and over what is near it. What the fuzzer once found stays found
//! (`cargo xtask fuzz` looks for more).

use std::{collections::BTreeSet, fs, path::Path};

use relay_core::pgoutput::{DecodeError, Message, decode};

#[path = "../fuzz/src/lib.rs"]
#[expect(unreachable_pub, reason = "it is the library of another package")]
mod targets;

/// Sessions up to this length have each of their bytes changed, in bytes.
const CHANGED_LIMIT_BYTES: usize = 600;

/// The files of a target's corpus.
fn corpus(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let files = fs::read_dir(folder).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let mut paths: Vec<_> = files.expect("the corpus").iter().map(fs::DirEntry::path).collect();
    paths.sort();
    assert!(paths.len() >= 30, "the corpus of {target} is gone");
    paths.iter().map(|path| fs::read(path).expect("a file of the corpus")).collect()
}

/// Runs the target's function, and tells the input when it panics.
fn run(target: fn(&[u8]), bytes: &[u8]) {
    if let Err(cause) = std::panic::catch_unwind(|| target(bytes)) {
        eprintln!("the input is {}", bytes.escape_ascii());
        std::panic::resume_unwind(cause);
    }
}

fn stream(bytes: &[u8]) {
    targets::stream(bytes);
}

#[test]
fn the_corpus_passes() {
    for (name, target) in [("pgoutput", targets::pgoutput as fn(&[u8])), ("stream", stream)] {
        for bytes in corpus(name) {
            run(target, &bytes);
        }
    }
}

/// What a real server sent, one of everything (`fuzz/seeds.sql`): all of it is understood. With columns as text
/// all becomes records, up to the last row, of a table that has lost a column; with binary columns the first row of
/// the outbox is refused.
#[test]
fn a_real_session_is_understood() {
    let all = [
        "begin",
        "commit",
        "delete",
        "insert",
        "message",
        "message outside",
        "origin",
        "relation",
        "truncate",
        "type",
        "update",
    ];
    for (name, session) in [("text", SESSION_TEXT), ("binary", SESSION_BINARY)] {
        let messages: Vec<_> = targets::events(session)
            .filter_map(|event| match event {
                targets::Event::Wal(bytes) => Some(bytes),
                _ => None,
            })
            .collect();
        assert_eq!(messages.len(), if name == "text" { 113 } else { 112 });
        let kinds: BTreeSet<_> = messages.iter().map(|m| kind(decode(m).unwrap())).collect();
        assert_eq!(kinds.into_iter().collect::<Vec<_>>(), all);
        let taken = targets::stream(session);
        let (halted_at, left) =
            (targets::events(session).nth(taken), targets::events(session).count() - taken);
        assert!(matches!(halted_at, Some(targets::Event::Wal([b'I', ..]))), "{halted_at:?}");
        // The row, its acknowledgement, the commit, keepalive, checkpoint, its acknowledgement, status.
        assert_eq!(left == 7, name == "text", "{left} of {name}");
    }
}

const SESSION_TEXT: &[u8] = include_bytes!("../fuzz/corpus/stream/session-text");
const SESSION_BINARY: &[u8] = include_bytes!("../fuzz/corpus/stream/session-binary");

fn kind(message: Message<'_>) -> &'static str {
    match message {
        Message::Begin { .. } => "begin",
        Message::Commit { .. } => "commit",
        Message::Origin { .. } => "origin",
        Message::Relation(_) => "relation",
        Message::Type { .. } => "type",
        Message::Insert { .. } => "insert",
        Message::Update { .. } => "update",
        Message::Delete { .. } => "delete",
        Message::Truncate { .. } => "truncate",
        Message::LogicalMessage { transactional: true, .. } => "message",
        Message::LogicalMessage { .. } => "message outside",
    }
}

#[test]
fn a_message_that_was_cut_or_prolonged_is_an_error() {
    for bytes in corpus("pgoutput").into_iter().filter(|bytes| decode(bytes).is_ok()) {
        for cut in 0..bytes.len() {
            assert_eq!(decode(&bytes[..cut]), Err(DecodeError::Truncated));
        }
        let longer = [&bytes[..], b"x"].concat();
        assert_eq!(decode(&longer), Err(DecodeError::TrailingBytes(1)));
    }
}

#[test]
fn damaged_messages_and_sessions_are_errors_at_worst_and_take_no_memory() {
    for bytes in corpus("pgoutput") {
        changed(&bytes, |bytes| run(targets::pgoutput, bytes));
    }
    for bytes in corpus("stream") {
        for cut in 0..bytes.len().min(CHANGED_LIMIT_BYTES) {
            run(stream, &bytes[..cut]);
        }
        if bytes.len() <= CHANGED_LIMIT_BYTES {
            changed(&bytes, |bytes| run(stream, bytes));
        }
    }
    // Lengths of 1 and 2 GiB were among them.
    #[cfg(target_os = "linux")]
    assert!(peak_address_space_kib() < 900 * 1024, "memory is taken for a length that is only claimed");
}

/// The most address space that this process ever had, in KiB: memory counts that was asked for and never touched.
#[cfg(target_os = "linux")]
fn peak_address_space_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("Linux tells");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmPeak:"));
    let kib = peak.and_then(|text| text.trim().strip_suffix(" kB")).map(str::parse);
    kib.expect("VmPeak").expect("a number")
}

/// Each byte changed in some ways, and at each place a number that is a length where there is one.
fn changed(bytes: &[u8], mut with: impl FnMut(&[u8])) {
    let mut copy = bytes.to_vec();
    for at in 0..bytes.len() {
        for to in [0, 1, 0x7F, 0xFF, bytes[at] ^ 1, bytes[at].wrapping_add(1)] {
            copy[at] = to;
            with(&copy);
        }
        copy[at] = bytes[at];
        for length in [u32::MAX, i32::MAX as u32, 1 << 31, 1 << 30, 0] {
            let Some(place) = copy.get_mut(at..at + 4) else { break };
            place.copy_from_slice(&length.to_be_bytes());
            with(&copy);
            copy[at..at + 4].copy_from_slice(&bytes[at..at + 4]);
        }
    }
}
