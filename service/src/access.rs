//! Who may use the administrative routes: whoever has the token, or, where none is set, whoever is on this machine and
//! the service listens to nobody else.

use std::{net::SocketAddr, sync::Arc};

use axum::{
    Router,
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use subtle::ConstantTimeEq as _;

use crate::{Problem, Secret};

/// What is asked of a caller.
#[derive(Debug)]
enum Rule {
    /// Nothing: only this machine can reach us.
    Loopback,
    /// This token, as `Authorization: Bearer`
    /// (<https://www.rfc-editor.org/rfc/rfc6750#section-2.1>).
    Token(Secret),
    /// The service listens to others, and no token is set.
    Nobody,
}

/// Guards every route of `routes`. `address` is the one that the service listens on, `token` its `http.admin_token`.
pub fn guard(routes: Router, address: SocketAddr, token: &Secret) -> Router {
    let rule = match (token.is_empty(), address.ip().is_loopback()) {
        (false, _) => Rule::Token(token.clone()),
        (true, true) => Rule::Loopback,
        (true, false) => Rule::Nobody,
    };
    routes.layer(middleware::from_fn_with_state(Arc::new(rule), admit))
}

async fn admit(State(rule): State<Arc<Rule>>, request: Request, next: Next) -> Response {
    match refusal(&rule, request.headers()) {
        None => next.run(request).await,
        Some(response) => response,
    }
}

fn refusal(rule: &Rule, headers: &HeaderMap) -> Option<Response> {
    let token = match rule {
        Rule::Loopback => return None,
        Rule::Nobody => {
            let problem = Problem::new(StatusCode::FORBIDDEN, "no-admin-token", "Administration is closed");
            let why = "http.listen is not a loopback address, and http.admin_token is not set: set it, or listen on loopback";
            return Some(problem.detail(why).into_response());
        }
        Rule::Token(token) => token,
    };
    let given = headers.get(header::AUTHORIZATION).and_then(|v| bearer(v.as_bytes()));
    if given.is_some_and(|given| given.ct_eq(token.expose().as_bytes()).into()) {
        return None;
    }
    let problem =
        Problem::new(StatusCode::UNAUTHORIZED, "admin-token-wanted", "The token is missing or wrong");
    let mut response =
        problem.detail("send http.admin_token as `Authorization: Bearer TOKEN`").into_response();
    response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    Some(response)
}

/// The token of the header's value; the scheme's name is not case-sensitive.
fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| token.trim_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(rule: &Rule, authorization: Option<&str>) -> Option<u16> {
        let mut headers = HeaderMap::new();
        if let Some(value) = authorization {
            headers.insert(header::AUTHORIZATION, value.parse().unwrap());
        }
        refusal(rule, &headers).map(|response| response.status().as_u16())
    }

    #[test]
    fn only_the_token_opens() {
        let rule = Rule::Token(Secret::new("s3cret"));
        for wrong in [
            None,
            Some(""),
            Some("s3cret"),
            Some("Basic s3cret"),
            Some("Bearer "),
            Some("Bearer s3cre"),
            Some("Bearer s3crets"),
        ] {
            assert_eq!(status(&rule, wrong), Some(401), "{wrong:?}");
        }
        assert_eq!(status(&rule, Some("Bearer s3cret")), None);
        assert_eq!(status(&rule, Some("bearer s3cret")), None);
    }

    #[test]
    fn without_a_token_only_loopback_is_open() {
        assert_eq!(status(&Rule::Loopback, None), None);
        assert_eq!(status(&Rule::Nobody, Some("Bearer ")), Some(403));
        assert_eq!(status(&Rule::Nobody, None), Some(403));
    }
}
