//! What proxies are told of an endpoint, besides how to log in.

use super::*;

#[tokio::test]
async fn proxies_are_told_which_answers_to_keep() {
    let world = World::new().await;
    let made = world.project().await;
    let (project, endpoint) = (text(&made["project"]["id"]), text(&made["endpoints"][0]["id"]));
    let path = format!("/projects/{project}/endpoints/{endpoint}");
    let role = format!("/internal/v1/endpoints/{endpoint}/roles/dormouse_owner");
    let told = async || {
        let (_, auth) = world.request(Method::GET, &role, Some(&world.service_token), Value::Null).await;
        serde_json::from_value::<RoleAuth>(auth).expect("role").query_cache
    };
    assert_eq!(told().await, Default::default());
    let settings = json!({"endpoint": {"settings": {"query_cache": {"max_age": 60, "stale_while_revalidate": 30}}}});
    let (status, changed) = world.api(Method::PATCH, &path, settings).await;
    assert_eq!((status, &changed["endpoint"]["settings"]["query_cache"]["max_age"]), (200, &json!(60)));
    assert_eq!(told().await.settings.map(|settings| settings.stale_while_revalidate), Some(30));

    let invalidate = format!("{path}/query_cache/invalidate");
    world.post(&invalidate, json!({"tags": ["a", "b"]})).await;
    world.post(&invalidate, json!({"tags": ["a"]})).await;
    assert_eq!((told().await.all, told().await.tags), (0, [("a".to_owned(), 2), ("b".to_owned(), 1)].into()));
    world.post(&invalidate, Value::Null).await;
    assert_eq!((told().await.all, told().await.tags.len()), (1, 0));
    for round in 0..3 {
        let tags: Vec<_> = (0..90).map(|number| format!("{round}-{number}")).collect();
        world.post(&invalidate, json!({"tags": tags})).await;
    }
    assert_eq!((told().await.all, told().await.tags.len()), (2, 0), "too many tags: all are invalid");
    assert_eq!(world.api(Method::POST, &invalidate, json!({"tags": []})).await.0, 400);
    assert_eq!(world.api(Method::DELETE, &path, Value::Null).await.0, 200);
}

#[tokio::test]
async fn proxies_are_told_whose_tokens_stand_for_a_password() {
    let world = World::new().await;
    let made = world.project().await;
    let (project, main) = (text(&made["project"]["id"]), text(&made["branch"]["id"]));
    let body = json!({"branch": {"parent_id": main}, "endpoints": [{"type": "read_write"}]});
    let child = world.post(&format!("/projects/{project}/branches"), body).await;
    let (main_endpoint, child_endpoint) = (text(&made["endpoints"][0]["id"]), text(&child["endpoints"][0]["id"]));
    let path = format!("/projects/{project}/jwks");
    let told = async |endpoint: &str| {
        let role = format!("/internal/v1/endpoints/{endpoint}/roles/dormouse_owner");
        let (_, auth) = world.request(Method::GET, &role, Some(&world.service_token), Value::Null).await;
        let issuers = serde_json::from_value::<RoleAuth>(auth).expect("role").token_issuers;
        issuers.into_iter().map(|issuer| (issuer.jwks_url, issuer.audience, issuer.issuer)).collect::<Vec<_>>()
    };
    assert!(told(main_endpoint).await.is_empty());
    let everywhere = json!({"jwks_url": "https://a.example/keys", "provider_name": "A", "jwt_audience": "shop",
        "jwt_issuer": "https://a.example/", "role_names": ["dormouse_owner", "web"]});
    let first = world.post(&path, everywhere).await;
    assert_eq!((&first["jwks"]["provider_name"], &first["operations"]), (&json!("A"), &json!([])));
    let here = json!({"jwks_url": "http://b.example/keys", "branch_id": main, "role_names": ["dormouse_owner"]});
    let second = world.post(&path, here).await;
    assert_eq!(second["jwks"]["provider_name"], "b.example");
    let others = world.post(&path, json!({"jwks_url": "https://c.example/keys"})).await;
    assert_eq!(others["jwks"]["role_names"], json!(["authenticator", "authenticated", "anonymous"]));

    let text_of = |text: &str| Some(text.to_owned());
    let a = ("https://a.example/keys".to_owned(), text_of("shop"), text_of("https://a.example/"));
    let b = ("http://b.example/keys".to_owned(), None, None);
    assert_eq!(told(main_endpoint).await, [a.clone(), b.clone()]);
    assert_eq!(told(child_endpoint).await, std::slice::from_ref(&a), "the other is for one branch only");
    assert_eq!(world.get(&path).await["jwks"].as_array().map(Vec::len), Some(3));
    let id = text(&first["jwks"]["id"]);
    let (status, removed) = world.api(Method::DELETE, &format!("{path}/{id}"), Value::Null).await;
    assert_eq!((status, &removed["id"]), (200, &json!(id)));
    assert_eq!(told(main_endpoint).await, [b]);
    assert_eq!(world.api(Method::DELETE, &format!("{path}/{id}"), Value::Null).await.0, 404);

    for bad in [
        json!({}),
        json!({"jwks_url": "file:///etc/passwd"}),
        json!({"jwks_url": "https://user:secret@a.example/keys"}),
        json!({"jwks_url": "https://a.example/", "role_names": []}),
        json!({"jwks_url": "https://a.example/", "role_names": ["postgres"]}),
        json!({"jwks_url": "https://a.example/", "jwt_audience": ""}),
        json!({"jwks_url": format!("https://a.example/{}", "x".repeat(1000))}),
    ] {
        assert_eq!(world.api(Method::POST, &path, bad.clone()).await.0, 400, "{bad}");
    }
    let elsewhere = json!({"jwks_url": "https://a.example/", "branch_id": "br-none-00000000"});
    assert_eq!(world.api(Method::POST, &path, elsewhere).await.0, 404);
    for _ in 2..20 {
        world.post(&path, json!({"jwks_url": "https://d.example/"})).await;
    }
    assert!((400..500).contains(&world.api(Method::POST, &path, json!({"jwks_url": "https://d.example/"})).await.0));
    // They go with what they belong to.
    assert_eq!(world.api(Method::DELETE, &format!("/projects/{project}"), Value::Null).await.0, 200);
}

#[tokio::test]
async fn proxies_are_told_where_clients_may_come_from() {
    let world = World::new().await;
    let made = world.project().await;
    let (project, main) = (text(&made["project"]["id"]), text(&made["branch"]["id"]));
    let endpoint = text(&made["endpoints"][0]["id"]);
    let path = format!("/projects/{project}");
    let told = async || {
        let role = format!("/internal/v1/endpoints/{endpoint}/roles/dormouse_owner");
        let (_, auth) = world.request(Method::GET, &role, Some(&world.service_token), Value::Null).await;
        let networks = serde_json::from_value::<RoleAuth>(auth).expect("role").allowed_ips;
        networks.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    let set = async |allowed: Value| {
        world.api(Method::PATCH, &path, json!({"project": {"settings": {"allowed_ips": allowed}}})).await
    };
    assert!(told().await.is_empty());
    let ips = json!({"ips": ["192.0.2.7", "198.51.100.0/24", "2001:db8::/32"], "protected_branches_only": false});
    let (status, changed) = set(ips.clone()).await;
    assert_eq!((status, &changed["project"]["settings"]["allowed_ips"]), (200, &ips));
    assert_eq!(told().await, ["192.0.2.7/32", "198.51.100.0/24", "2001:db8::/32"]);
    // What is not said stays.
    assert_eq!(world.api(Method::PATCH, &path, json!({"project": {"name": "other"}})).await.0, 200);
    assert_eq!(told().await.len(), 3);

    set(json!({"ips": ["192.0.2.7"], "protected_branches_only": true})).await;
    assert!(told().await.is_empty());
    let protect = json!({"branch": {"protected": true}});
    world.api(Method::PATCH, &format!("{path}/branches/{main}"), protect).await;
    assert_eq!(told().await, ["192.0.2.7/32"]);
    for bad in ["", "localhost", "192.0.2.0/33", "192.0.2", "1.2.3.4-1.2.3.9"] {
        assert_eq!(set(json!({ "ips": [bad] })).await.0, 400, "{bad}");
    }
    assert_eq!(set(json!({"ips": vec!["192.0.2.7"; 201]})).await.0, 400);
    assert_eq!(told().await, ["192.0.2.7/32"]);
    set(json!({"ips": []})).await;
    assert!(told().await.is_empty());
    let made = json!({"project": {"settings": {"allowed_ips": {"ips": ["192.0.2.0/24"]}}}});
    let made = world.post("/projects", made).await;
    assert_eq!(made["project"]["settings"]["allowed_ips"]["ips"], json!(["192.0.2.0/24"]));
}
