//! How a later command talks to the supervisor: one line of JSON each way, over a socket that only its user may
//! open.

use std::{fs, os::unix::fs::PermissionsExt, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    time::timeout,
};

use crate::{
    crew::Crew,
    desk::Desk,
    failure::{Explain, Failure, Result},
    keeper::Order,
    layout::Layout,
};

/// The longest line on the socket. Bytes.
const LINE_BYTES_MAX: u64 = 64 << 10;
/// How long a client may take to send its line.
const REQUEST_LIMIT: Duration = Duration::from_secs(5);

#[derive(Debug, Serialize, Deserialize)]
struct Request {
    order: Order,
    /// A process, or all instances of a service.
    who: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Answer {
    ok: bool,
    /// What happened, or why not.
    message: String,
}

/// Carries out commands, one after the other, until dropped.
pub(crate) async fn serve(desk: &Arc<Desk>, crew: &Arc<Crew>) -> Result<()> {
    let path = desk.layout.control();
    let _ = fs::remove_file(&path);
    let listener = UnixListener::bind(&path).explain(|| format!("listen on {}", path.display()))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))
        .explain(|| format!("close {} to others", path.display()))?;
    loop {
        let (stream, _) = listener.accept().await.explain(|| "accept a command".to_owned())?;
        // A client that goes away in the middle takes nothing with it.
        let _ = answer(stream, crew).await;
    }
}

async fn answer(stream: UnixStream, crew: &Crew) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    let mut limited = (&mut reader).take(LINE_BYTES_MAX);
    timeout(REQUEST_LIMIT, limited.read_line(&mut line)).await??;
    let answer = match serde_json::from_str::<Request>(&line) {
        Ok(request) => match carry_out(crew, &request).await {
            Ok(message) => Answer { ok: true, message },
            Err(failure) => Answer { ok: false, message: failure.to_string() },
        },
        Err(error) => Answer { ok: false, message: format!("not a command: {error}") },
    };
    let text = serde_json::to_string(&answer).unwrap_or_default();
    reader.get_mut().write_all(format!("{text}\n").as_bytes()).await
}

async fn carry_out(crew: &Crew, request: &Request) -> Result<String> {
    let names = crew.tell(&request.who, request.order).await?;
    if request.order == Order::Stop {
        return Ok(format!("{} stopped", names.join(", ")));
    }
    for name in &names {
        crew.ready(name).await?;
    }
    Ok(format!("{} ready", names.join(", ")))
}

/// Sends a command to the supervisor of this stack and returns its answer.
pub(crate) async fn send(layout: &Layout, order: Order, who: &str) -> Result<String> {
    let path = layout.control();
    let stream = UnixStream::connect(&path).await.explain(|| "reach the supervisor".to_owned());
    let mut stream =
        stream.map_err(|failure| failure.hint("is it still starting? `cargo xtask status` tells"))?;
    let request = Request { order, who: who.to_owned() };
    let line = serde_json::to_string(&request).explain(|| "write the command".to_owned())?;
    stream.write_all(format!("{line}\n").as_bytes()).await.explain(|| "tell the supervisor".to_owned())?;
    let mut text = String::new();
    BufReader::new(stream.take(LINE_BYTES_MAX))
        .read_line(&mut text)
        .await
        .explain(|| "hear from the supervisor".to_owned())?;
    let answer: Answer = serde_json::from_str(&text).explain(|| "understand the supervisor".to_owned())?;
    if answer.ok { Ok(answer.message) } else { Err(Failure::new(answer.message)) }
}
