{{/*
A StatefulSet: for processes whose name must outlive them. A restarted pod finds its partitions, or the work it held, by
its name at once. Argument: that of `tidegate.pod`, and optionally claims (volumeClaimTemplates), scaled (true if somebody else
says how many there are: an upgrade must not take that back).
*/}}
{{- define "tidegate.statefulSet" -}}
apiVersion: apps/v1
kind: StatefulSet
metadata:
  name: {{ include "tidegate.name" . }}
  labels:
    {{- include "tidegate.labels" . | nindent 4 }}
spec:
  serviceName: {{ include "tidegate.fullname" .root }}
  {{- if not .scaled }}
  replicas: {{ .replicas | default .service.replicas | int }}
  {{- end }}
  # The pods do not need each other. An update still replaces one after the other.
  podManagementPolicy: Parallel
  minReadySeconds: {{ ternary .service.minReadySeconds 10 (hasKey .service "minReadySeconds") | int }}
  selector:
    matchLabels:
      {{- include "tidegate.selector" . | nindent 6 }}
  template:
    metadata:
      labels:
        {{- include "tidegate.selector" . | nindent 8 }}
      {{- with .root.Values.podAnnotations }}
      annotations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
    spec:
      {{- include "tidegate.pod" (merge (dict "stateful" true) .) | nindent 6 }}
  {{- with .claims }}
  volumeClaimTemplates:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}

{{/*
A Deployment, for processes that need no lasting name. Argument: that of `tidegate.pod`, and optionally strategy, and scaled as
above.
*/}}
{{- define "tidegate.deployment" -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ include "tidegate.name" . }}
  labels:
    {{- include "tidegate.labels" . | nindent 4 }}
spec:
  {{- if not .scaled }}
  replicas: {{ .replicas | default .service.replicas | int }}
  {{- end }}
  minReadySeconds: {{ ternary .service.minReadySeconds 10 (hasKey .service "minReadySeconds") | int }}
  {{- with .strategy }}
  strategy:
    type: {{ . }}
  {{- end }}
  selector:
    matchLabels:
      {{- include "tidegate.selector" . | nindent 6 }}
  template:
    metadata:
      labels:
        {{- include "tidegate.selector" . | nindent 8 }}
      {{- with .root.Values.podAnnotations }}
      annotations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
    spec:
      {{- include "tidegate.pod" . | nindent 6 }}
{{- end }}

{{/*
What KEDA scales. It takes replicas away slowly. Argument: dict root, component, kind of the workload, scaling (values: minReplicas,
maxReplicas, scaleDownAfterSeconds), triggers (list).
*/}}
{{- define "tidegate.scaledObject" -}}
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
metadata:
  name: {{ include "tidegate.name" . }}
  labels:
    {{- include "tidegate.labels" . | nindent 4 }}
spec:
  scaleTargetRef:
    apiVersion: apps/v1
    kind: {{ .kind }}
    name: {{ include "tidegate.name" . }}
  minReplicaCount: {{ .scaling.minReplicas | default 1 | int }}
  maxReplicaCount: {{ .scaling.maxReplicas | int }}
  advanced:
    horizontalPodAutoscalerConfig:
      behavior:
        scaleDown:
          stabilizationWindowSeconds: {{ .scaling.scaleDownAfterSeconds | default 600 | int }}
          policies:
            - {type: Pods, value: 1, periodSeconds: 60}
  triggers:
    {{- toYaml .triggers | nindent 4 }}
{{- end }}

{{/*
A service account, and what it may ask the cluster for. Argument: dict root, component, account (its name; it is made unless the
release has one for all), name and namespace of the role, rules (list).
*/}}
{{- define "tidegate.rights" -}}
{{- if not .root.Values.serviceAccountName }}
---
apiVersion: v1
kind: ServiceAccount
metadata:
  name: {{ .account }}
  labels:
    {{- include "tidegate.labels" . | nindent 4 }}
automountServiceAccountToken: false
{{- end }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata:
  name: {{ .name }}
  namespace: {{ .namespace }}
  labels:
    {{- include "tidegate.labels" . | nindent 4 }}
rules:
  {{- toYaml .rules | nindent 2 }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  name: {{ .name }}
  namespace: {{ .namespace }}
  labels:
    {{- include "tidegate.labels" . | nindent 4 }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: Role
  name: {{ .name }}
subjects:
  - kind: ServiceAccount
    name: {{ .account }}
    namespace: {{ .root.Release.Namespace }}
{{- end }}
