//! `redrive` and `discard`: which letters, and the question to the relay.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use relay_core::redrive::{Next, Options, Place};
use service::{Failure, exit, table};

use super::Filter;
use crate::{
    config::Settings,
    dlq::{
        api::{Aggregate, LETTERS_LIMIT, PATH, Report, Request},
        archive::Archive,
    },
    error::Error,
};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// The relay gives a redrive up by itself when nothing comes of it; this is for a relay that does not answer at all.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3600);
/// The most of an answer that is read, in bytes.
const ANSWER_LIMIT_BYTES: u64 = 16 << 20;

#[derive(Debug, clap::Args)]
pub(crate) struct Selection {
    /// Each as PARTITION/OFFSET, as `list` tells it
    #[arg(value_name = "PARTITION/OFFSET")]
    letters: Vec<Place>,
    /// Every open letter. Frees parked aggregates that have none, too
    #[arg(long, conflicts_with = "letters")]
    all: bool,
    #[command(flatten)]
    filter: Filter,
    /// Only tell what would be done. Asks no relay
    #[arg(long)]
    dry_run: bool,
    /// Where the relay is. Without this, http.listen of the configuration. Where that has an admin token, it is sent
    #[arg(long, value_name = "URL")]
    relay: Option<String>,
    /// A JSON object a line
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Redrive {
    #[command(flatten)]
    selection: Selection,
    /// Publish to this topic instead of each letter's own
    #[arg(long, value_name = "NAME", conflicts_with = "all")]
    to_topic: Option<String>,
    /// Publish once more what was redriven before: name it, or add --state redriven
    #[arg(long)]
    again: bool,
    /// Publish what there is of letters whose row could not be read whole
    #[arg(long)]
    as_is: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Discard {
    #[command(flatten)]
    selection: Selection,
}

pub(super) fn redrive(settings: &Settings, redrive: &Redrive) -> Result<(), Failure> {
    let Redrive { selection, to_topic: topic, again, as_is } = redrive;
    let request = Request {
        topic: topic.clone(),
        again: *again,
        as_is: *as_is,
        all: selection.all,
        ..Request::default()
    };
    selection.carry_out(settings, request)
}

pub(super) fn discard(settings: &Settings, discard: &Discard) -> Result<(), Failure> {
    let selection = &discard.selection;
    selection.carry_out(settings, Request { discard: true, all: selection.all, ..Request::default() })
}

/// How it went over all requests.
#[derive(Debug, Default)]
struct Sum {
    letters: usize,
    open: usize,
}

impl Selection {
    fn carry_out(&self, settings: &Settings, mut request: Request) -> Result<(), Failure> {
        let places = self.resolve(settings, &mut request)?;
        let mut sum = Sum::default();
        // Freeing what is empty is worth a request, even where there is no letter.
        let batches: Vec<&[Place]> =
            if places.is_empty() && self.all { vec![&[]] } else { places.chunks(LETTERS_LIMIT).collect() };
        for batch in batches {
            let report = if self.dry_run {
                dry_run(settings, batch, &request)?
            } else {
                request.letters = batch.iter().map(Place::to_string).collect();
                self.ask(settings, &request)?
            };
            sum.letters += report.letters.len();
            sum.open += report.letters.iter().filter(|line| !line.done).count();
            self.tell(&report);
        }
        if sum.letters == 0 && !self.json {
            service::say!("there are no such letters");
        }
        if sum.open > 0 {
            let what = format!("{} of {} letters stay open", sum.open, sum.letters);
            return Err(Failure::new(exit::Kind::Halted, what).hint("the table above says why, for each"));
        }
        Ok(())
    }

    /// Which letters, and whose.
    fn resolve(&self, settings: &Settings, request: &mut Request) -> Result<Vec<Place>, Failure> {
        if self.letters.is_empty() && !self.all && !self.filter.names_something() {
            return Err(Failure::configuration(
                "say which letters: PARTITION/OFFSET, --all, or a filter such as --reason",
            )
            .hint("`cdc-relay dlq list` tells which there are, and --dry-run what would be done"));
        }
        let entries = self.filter.entries(settings, &self.letters)?;
        let sources: BTreeSet<&String> = entries.iter().map(|entry| &entry.about.source).collect();
        if sources.len() > 1 {
            let what = format!("these letters are of {} relays: {sources:?}", sources.len());
            return Err(Failure::configuration(what).hint("choose one with --source"));
        }
        request.source = sources.into_iter().next().cloned();
        if self.letters.is_empty() {
            return Ok(entries.iter().map(|entry| entry.about.letter).collect());
        }
        // What is named and is not there is for the answer to tell.
        let named: BTreeSet<Place> = self.letters.iter().copied().collect();
        Ok(named.into_iter().collect())
    }

    fn ask(&self, settings: &Settings, request: &Request) -> Result<Report, Failure> {
        let base = relay_url(settings, self.relay.as_deref());
        if base.to_ascii_lowercase().starts_with("https:") {
            let why = "--relay begins with https://, and the relay's administration speaks plain HTTP only";
            return Err(
                Failure::configuration(why).hint("write http://, and send a token over a network you trust")
            );
        }
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            // The token goes nowhere else.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(ANSWER_TIMEOUT))
            .build()
            .into();
        let mut post = agent.post(format!("{base}{PATH}"));
        if !settings.admin_token.is_empty() {
            post = post.header("authorization", format!("Bearer {}", settings.admin_token.expose()));
        }
        let unreachable = |e: ureq::Error| {
            Failure::new(exit::Kind::GaveUp, format!("the relay at {base} cannot be asked: {e}")).hint(
                "is it running there? --relay URL says where else; `cdc-relay dlq list` shows what it did",
            )
        };
        let mut response = post.send_json(request).map_err(unreachable)?;
        let status = response.status().as_u16();
        let body = response.body_mut().with_config().limit(ANSWER_LIMIT_BYTES).read_to_vec();
        let body = body.map_err(unreachable)?;
        if status == 200 {
            let not_ours =
                |e| Failure::new(exit::Kind::Internal, format!("{base} answers what no relay does: {e}"));
            return serde_json::from_slice(&body).map_err(not_ours);
        }
        Err(problem(&base, status, &body))
    }

    fn tell(&self, report: &Report) {
        if self.json {
            service::say!("{}", serde_json::json!(report));
            return;
        }
        if !report.letters.is_empty() {
            let would = if self.dry_run { "would be " } else { "" };
            let rows = report.letters.iter().map(|line| {
                let would =
                    if matches!(line.outcome.as_str(), "redriven" | "discarded") { would } else { "" };
                [line.letter.clone(), format!("{would}{}", line.outcome), table::printable(&line.detail)]
            });
            let rows: Vec<_> = rows.collect();
            table::print(["LETTER", "OUTCOME", "DETAIL"], &rows);
        }
        let name = |a: &Aggregate| table::printable(&format!("{}/{}", a.kind, a.id));
        let freed = if self.dry_run { "would be freed" } else { "freed" };
        for aggregate in &report.freed {
            service::say!("{freed}: {}", name(aggregate));
        }
        for aggregate in &report.still_parked {
            service::say!("still parked: {}, {} letters are open", name(aggregate), aggregate.open_letters);
        }
    }
}

/// What a relay would do.
fn dry_run(settings: &Settings, batch: &[Place], request: &Request) -> Result<Report, Failure> {
    let Request { again, as_is, discard, all, .. } = *request;
    let options = Options { again, as_is, discard, all, has_topic: request.topic.is_some() };
    // Where no letter is there is no source, and nothing of it either.
    let source = request.source.as_deref().unwrap_or_default();
    let archive = Archive::open(settings).map_err(Error::into_failure)?;
    let plan = archive.plan(source, batch.iter().copied().collect(), options);
    let mut plan = plan.map_err(Error::into_failure)?;
    // None is refused, so none is left.
    while let Next::Take(step) = plan.next_step() {
        plan.settled(&step);
    }
    let freed = plan.free();
    Ok(Report::new(&plan, &freed))
}

/// Where the relay is: what was given, or else where the configuration has it listen.
pub(crate) fn relay_url(settings: &Settings, given: Option<&str>) -> String {
    match given {
        Some(url) => url.trim_end_matches('/').to_owned(),
        None => format!("http://{}", reachable(&settings.listen)),
    }
}

/// Where a relay is that listens everywhere.
fn reachable(listen: &str) -> String {
    match listen.parse::<SocketAddr>() {
        Ok(address) if address.ip().is_unspecified() && address.is_ipv4() => {
            format!("127.0.0.1:{}", address.port())
        }
        Ok(address) if address.ip().is_unspecified() => format!("[::1]:{}", address.port()),
        _ => listen.to_owned(),
    }
}

fn problem(base: &str, status: u16, body: &[u8]) -> Failure {
    let problem: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
    let text = |name: &str| problem[name].as_str().unwrap_or_default();
    let kind = match status {
        401 | 403 => exit::Kind::Refused,
        409 | 503 => exit::Kind::GaveUp,
        400..=499 => exit::Kind::BadConfiguration,
        _ => exit::Kind::Internal,
    };
    let mut what = format!("the relay at {base} refuses ({status}): {}", text("title"));
    for part in [text("detail"), &problem["errors"].as_array().map(|e| format!("{e:?}")).unwrap_or_default()]
    {
        if !part.is_empty() {
            what = format!("{what}: {part}");
        }
    }
    let failure = Failure::new(kind, what);
    match status {
        401 => failure.hint("set http.admin_token here as at the relay: CDC_RELAY_HTTP__ADMIN_TOKEN(_FILE)"),
        _ => failure,
    }
}

#[cfg(test)]
mod tests {
    use super::reachable;

    #[test]
    fn a_relay_that_listens_everywhere_is_asked_here() {
        assert_eq!(reachable("0.0.0.0:8081"), "127.0.0.1:8081");
        assert_eq!(reachable("[::]:8081"), "[::1]:8081");
        assert_eq!(reachable("relay.internal:8081"), "relay.internal:8081");
    }
}
