"""Planted bugs of what keeps strangers out, and of what undoes faults."""

from mutants.planted import Mutant, bug

_SECURITY = "tests/cluster/test_security.py"
_FAULTS = "tests/cluster/test_faults.py"
_INJECTOR = "tests/deploy/test_fault_injector.py"

GUARDS: tuple[Mutant, ...] = (
    # Security.
    bug(
        "a token is known by its number alone",
        "cluster/tokens.py",
        "        if row is None or not hmac.compare_digest(_digest(token), row.sha256):\n",
        "        if row is None:\n",
        "tests/cluster/test_tokens.py::test_any_other_text_is_nobodys",
    ),
    bug(
        "a token whose time is over is good",
        "cluster/tokens.py",
        "        if row.expires_unix_s and self._wall() >= row.expires_unix_s:\n",
        "        if row.expires_unix_s and self._wall() < 0:\n",
        "tests/cluster/test_tokens.py::test_a_token_ends_with_its_time",
    ),
    bug(
        "any token is good for any call",
        "cluster/security.py",
        "            if not caller.may(need):\n",
        "            if caller is NOBODY:\n",
        f"{_SECURITY}::test_each_call_needs_its_role",
    ),
    bug(
        "a token acts for any tenant",
        "cluster/security.py",
        '    if not own or claimed in ("", own):\n        return own or claimed\n',
        '    if not own or claimed not in ("", own):\n        return claimed\n',
        f"{_SECURITY}::test_a_token_of_a_tenant_acts_for_it_alone",
    ),
    bug(
        "the front encrypts nothing",
        "cluster/security.py",
        "Door(server_credentials(section.tls), bool(section.tokens)",
        "Door(None, bool(section.tokens)",
        f"{_SECURITY}::test_ports_that_others_can_reach_need_tls_and_who_calls_known",
    ),
    bug(
        "every certificate of a client is believed",
        "cluster/tls.py",
        "require_client_authentication=bool(section.client_ca)\n",
        "require_client_authentication=False\n",
        f"{_SECURITY}::test_the_front_may_ask_for_certificates_and_the_cluster_itself_does_not",
    ),
    bug(
        "the secret of the cluster is not compared",
        "cluster/security.py",
        "        return hmac.compare_digest(shown, self._digest)\n",
        "        return len(shown) == len(self._digest)\n",
        f"{_SECURITY}::test_the_secret_of_the_cluster_opens_all_its_ports_and_a_token_only_the_front",
    ),
    bug(
        "a call that is refused is not noted",
        "cluster/security.py",
        "        if audit is not None:\n            audit.refused(",
        "        if audit is not None and caller is not NOBODY:\n            audit.refused(",
        f"{_SECURITY}::test_refused_calls_are_counted_and_noted_without_what_they_showed",
    ),
    bug(
        "a change is not noted",
        "cluster/audit.py",
        '        if handler is None or handler.unary_unary is None or needed(method) != "admin":\n',
        '        if handler is None or handler.unary_unary is None or needed(method) == "admin":\n',
        "tests/cluster/test_audit.py::test_only_what_may_change_something_is_noted",
    ),
    bug(
        "a method that nobody thought of is for every token",
        "cluster/roles.py",
        '_UPDATES: "update"}.get(service, "admin")\n',
        '_UPDATES: "update"}.get(service, KNOWN)\n',
        "tests/cluster/test_roles.py::test_what_is_not_known_needs_admin",
    ),
    bug(
        "a secret may be read by others",
        "cluster/secret_file.py",
        "    if mode & (0o037 if mounted else 0o077):\n",
        "    if mode & (0o037 if mounted else 0o007):\n",
        "tests/cluster/test_secret_file.py::test_a_secret_that_others_can_reach_is_refused",
    ),
    bug(
        "others may reach a port that asks nobody who they are",
        "cluster/listen.py",
        '    missing += [] if door.guarded else ["security.tokens"]\n',
        "    missing += []\n",
        "tests/cluster/test_listen.py"
        "::test_others_may_reach_only_what_is_encrypted_and_asks_who_they_are",
    ),
    # Faults on purpose.
    bug(
        "faults are allowed everywhere",
        "deploy/fault_injector.py",
        "        if not self._enabled:\n            raise",
        "        if self._enabled is None:\n            raise",
        f"{_INJECTOR}::test_faults_are_refused_unless_the_settings_allow_them",
    ),
    bug(
        "a fault never ends",
        "cluster/faults.py",
        "        return self._clock() + max(fault.seconds - age_s, 0.0)\n",
        "        return self._clock() + max(MAX_SECONDS - age_s, 0.0)\n",
        f"{_FAULTS}::test_a_fault_is_over_by_the_clock_of_who_suffers_it",
    ),
    bug(
        "a process that starts suffers a fault from its beginning",
        "cluster/faults.py",
        "        age_s = max(self._unix_clock() - fault.began_unix_s, 0.0)\n",
        "        age_s = 0.0\n",
        f"{_FAULTS}::test_a_process_that_starts_suffers_only_what_is_left",
    ),
    bug(
        "what was stopped stays so",
        "deploy/fault_keeper.py",
        "        send_signal(victim, signal.SIGCONT)\n",
        "        pass\n",
        "tests/deploy/test_fault_keeper.py::test_a_process_stands_still_until_the_time_is_over",
    ),
    bug(
        "what was damaged stays so",
        "deploy/fault_keeper.py",
        "    finally:\n        repair(fault)\n",
        "    finally:\n        pass\n",
        "tests/deploy/test_fault_keeper.py::test_a_byte_is_another_one_for_a_while",
    ),
    bug(
        "what a killed keeper left is not repaired",
        "deploy/fault_injector.py",
        '        if fault.kind == "corrupt":\n            repair(fault)\n',
        "",
        f"{_INJECTOR}::test_what_a_killed_keeper_left_is_repaired_at_the_next_start",
    ),
    bug(
        "a process of somebody else is hit",
        "deploy/fault_injector.py",
        "        if pid not in known:\n",
        "        if not known:\n",
        f"{_INJECTOR}::test_processes_of_others_are_never_hit",
    ),
)
