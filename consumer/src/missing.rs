//! The events that are missing before one, from whoever keeps them all: pages of `{"events": […], "nextCursor": …}`, as
//! `GET /api/orders/{id}/events` of the order API gives them.

use std::{fmt::Write as _, time::Duration};

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::{
    record::{Event, Record},
    tls,
};

/// How long a page may take.
const TIMEOUT: Duration = Duration::from_secs(5);
/// The bytes of a page.
const PAGE_BYTES_MAX: u64 = 4 << 20;
/// The pages of one aggregate.
const PAGES_MAX: usize = 100;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Page {
    events: Vec<Box<RawValue>>,
    next_cursor: Option<String>,
}

/// The events of an aggregate after the version `after` and before `before`, in order; none if nobody knows it.
///
/// # Errors
/// Why not, for a person: it may pass.
pub(crate) async fn fetch<E: Event>(
    url: &str,
    record: &Record<'_>,
    aggregate: &str,
    after: i64,
    before: i64,
) -> Result<Vec<E>, String> {
    let mut events = Vec::new();
    let mut cursor = None;
    for _ in 0..PAGES_MAX {
        let address = address(url, aggregate, cursor.as_deref());
        // The client blocks.
        let page = tokio::task::spawn_blocking(move || page(&address)).await.map_err(|e| e.to_string())??;
        let Some(page) = page else { break };
        for body in &page.events {
            let found = Record {
                topic: record.topic,
                key: record.key,
                value: Some(body.get().as_bytes()),
                headers: Some(Vec::new()),
            };
            let event =
                E::parse(&found).map_err(|poison| format!("{url} gave what is no event: {poison}"))?;
            let wanted = |(id, version): (&str, i64)| id == aggregate && version > after && version < before;
            if event.version().is_some_and(wanted) {
                events.push(event);
            }
        }
        cursor = page.next_cursor;
        if cursor.is_none() {
            break;
        }
    }
    events.sort_by_key(|event| event.version().map(|(_, version)| version));
    Ok(events)
}

fn address(url: &str, aggregate: &str, cursor: Option<&str>) -> String {
    let mut address = url.replace("{aggregate}", &escape(aggregate));
    if let Some(cursor) = cursor {
        address.push(if address.contains('?') { '&' } else { '?' });
        address.push_str("cursor=");
        address.push_str(&escape(cursor));
    }
    address
}

/// Percent-encoding of all but RFC 3986's unreserved characters.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            // Writing to a text cannot fail.
            let _ = write!(escaped, "%{byte:02X}");
        }
    }
    escaped
}

/// A page; nothing where there is no such aggregate.
fn page(address: &str) -> Result<Option<Page>, String> {
    let config = ureq::Agent::config_builder().timeout_global(Some(TIMEOUT)).http_status_as_error(false);
    let agent: ureq::Agent = config.tls_config(tls::config()).build().into();
    let mut answer = agent.get(address).call().map_err(|e| format!("GET {address}: {e}"))?;
    let status = answer.status().as_u16();
    if status == 404 {
        return Ok(None);
    }
    if status != 200 {
        return Err(format!("GET {address} answered {status}"));
    }
    let body = answer.body_mut().with_config().limit(PAGE_BYTES_MAX).read_to_vec();
    let body = body.map_err(|e| format!("GET {address}: {e}"))?;
    serde_json::from_slice(&body).map(Some).map_err(|e| format!("GET {address} gave no page of events: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_aggregate_and_a_cursor_cannot_break_out_of_the_address() {
        let url = "http://h/orders/{aggregate}/events";
        assert_eq!(address(url, "o-1", None), "http://h/orders/o-1/events");
        assert_eq!(
            address(url, "a/../b?x#y", Some("c&d")),
            "http://h/orders/a%2F..%2Fb%3Fx%23y/events?cursor=c%26d"
        );
        assert_eq!(
            address("http://h/e?limit=100&id={aggregate}", "ü", Some("n")),
            "http://h/e?limit=100&id=%C3%BC&cursor=n"
        );
    }
}
