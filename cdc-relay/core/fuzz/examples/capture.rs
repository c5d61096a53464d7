//! Makes seeds for the corpus of what `seeds.sql` prints:
//!
//! ```sh
//! psql "$URL" --no-psqlrc --quiet --file=seeds.sql | cargo run --release --example capture -- DIR
//! cargo xtask fuzz pgoutput --merge DIR/pgoutput
//! cargo xtask fuzz stream --merge DIR/stream
//! cp DIR/session-* corpus/stream
//! ```

use std::{collections::BTreeMap, error::Error, fs, io, path::PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    let folder = PathBuf::from(std::env::args().nth(1).ok_or("want a folder to write to")?);
    let mut sessions: BTreeMap<String, Vec<Vec<u8>>> = BTreeMap::new();
    for line in io::stdin().lines() {
        let line = line?;
        if let Some((session, hex)) = line.split_once('|') {
            sessions.entry(session.to_owned()).or_default().push(bytes(hex)?);
        }
    }
    for target in ["pgoutput", "stream"] {
        fs::create_dir_all(folder.join(target))?;
    }
    for (name, messages) in &sessions {
        for (i, message) in messages.iter().enumerate() {
            fs::write(folder.join(format!("pgoutput/{name}-{i}")), message)?;
        }
        let events = messages.iter().flat_map(|m| wal(m).into_iter().chain(after(m)));
        fs::write(
            folder.join(format!("session-{name}")),
            b"h".iter().copied().chain(events).collect::<Vec<_>>(),
        )?;
        // Each transaction by itself, behind the tables as they were described before.
        let mut described: Vec<u8> = Vec::new();
        let starts = (0..messages.len()).filter(|i| messages[*i].starts_with(b"B"));
        for (start, policy) in starts.zip(b"hdps".iter().cycle()) {
            let length = messages[start..].iter().position(|m| m.starts_with(b"C")).ok_or("no commit")?;
            let transaction = &messages[start..=start + length];
            let mut out: Vec<u8> = [&[*policy], &described[..]].concat();
            out.extend(transaction.iter().flat_map(|m| wal(m).into_iter().chain(after(m))));
            fs::write(folder.join(format!("stream/{name}-{start}")), out)?;
            described.extend(transaction.iter().filter(|m| m.starts_with(b"R")).flat_map(|m| wal(m)));
        }
    }
    Ok(())
}

/// The event of the `stream` target that a message is.
fn wal(message: &[u8]) -> Vec<u8> {
    let length = u16::try_from(message.len()).expect("seeds are small");
    [&b"w"[..], &length.to_be_bytes(), message].concat()
}

/// A row is acknowledged at once; after a commit, a keepalive asks for the status, and gets it behind a
/// checkpoint.
fn after(message: &[u8]) -> Vec<u8> {
    match message.first() {
        Some(b'I') => b"s\0".to_vec(),
        Some(b'C') => [&b"k"[..], &message[10..18], b"\x01cat\x0B"].concat(),
        _ => Vec::new(),
    }
}

fn bytes(hex: &str) -> Result<Vec<u8>, Box<dyn Error>> {
    let pairs = hex.as_bytes().chunks(2).map(str::from_utf8);
    pairs.map(|pair| Ok(u8::from_str_radix(pair?, 16)?)).collect()
}
